"""Where a model's files come from: the embedded default, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import ModelError
from . import embedded

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Never code and never pickles: nothing of a checkpoint is executed.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Sub-folders hold exports for other runtimes; consolidated.safetensors repeats the weights under other names.
_HUB_IGNORED = ["*/*", "consolidated*"]
_FOREIGN_WEIGHTS = {".gguf": "GGUF", ".bin": "PyTorch pickle", ".pt": "PyTorch pickle", ".pth": "PyTorch pickle"}


def resolve_model(name: str | None) -> Path:
    """The folder of config.json, tokenizer and safetensors weights that `name` stands for.

    None or "smollm2-135m-linocut" is the embedded model, made on first use, and "smollm2-135m-instruct" the
    autoregressive original it was made from. A path that exists is taken before a name, or a hub id, of the same
    spelling.
    A hub id "org/name" is fetched into Hugging Face's own cache, or found there; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN
    are honoured. A local folder without any weights passes: its shape can be served with random ones.
    Raises ModelError, in one sentence, for anything else.
    """
    if name is None:
        return embedded.ensure()
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path, name)
        return path
    if path.is_file():
        raise ModelError(f"{name} is a file: name the folder that holds config.json and *.safetensors")
    if name in (embedded.ADAPTED, embedded.ORIGINAL):
        return embedded.ensure(adapted=name == embedded.ADAPTED)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name!r} is neither an existing folder nor a Hugging Face id like 'org/name' nor {embedded.ORIGINAL!r}"
        )
    folder = _fetch(name)
    _check_folder(folder, name)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name} has no *.safetensors on the hub: Linocut reads no other format")
    return folder


def _check_folder(folder: Path, name: str) -> None:
    """Raise ModelError unless `folder` has a config.json and no weights that are unreadable or incomplete."""
    foreign = {_FOREIGN_WEIGHTS[path.suffix] for path in folder.iterdir() if path.suffix in _FOREIGN_WEIGHTS}
    if foreign and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name} holds {' and '.join(sorted(foreign))} weights only: Linocut reads *.safetensors")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} has no config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{name} has a damaged {index.name}: {error!r}") from error
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ModelError(
                f"{name} is incomplete: {len(missing)} of {len(shards)} weight files are missing ({missing[0]})"
            )


def _fetch(name: str) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except errors.GatedRepoError as error:
        raise ModelError(f"{name} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{name} does not exist on the hub, or is private and HF_TOKEN does not open it") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(f"{name} is not (wholly) in the local cache and {why}") from error
    except Exception as error:  # HTTP and proxy errors come from whichever client library huggingface_hub uses
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{name} could not be fetched from the hub: {lines[0]}") from error
