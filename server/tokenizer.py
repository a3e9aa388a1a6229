"""The checkpoint's tokenizer: texts to ids, ids to text. Imports neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from linocut.engine.errors import ModelError
from linocut.engine.messages import ModelInfo

from .chat_template import ChatTemplate
from .control_text import ControlText

_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# AutoTokenizer imports torch, so it runs, where it is needed at all, in a process of its own.
_CONVERT = (
    "import sys; from transformers import AutoTokenizer;"
    " sys.stdout.write(AutoTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer.to_str())"
)


class Tokenizer:
    """Thread-safe: the backend is never changed after loading."""

    def __init__(self, backend: Backend, template: ChatTemplate | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.template = template
        self.control = ControlText(backend, _special_ids(backend), ())

    def guard(self, model: ModelInfo) -> None:
        """Learn from the engine which ids no text may produce."""
        forbidden = set(model.banned_ids) | ({model.mask_id} if model.mask_id is not None else set())
        self.control = ControlText(self._backend, {*_special_ids(self._backend), *model.stop_ids}, forbidden)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.control.encode_prompt(text, add_special_tokens)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        return [self._backend.id_to_token(i) or "" for i in ids]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder; None if it has none (then token ids are served). Raises ModelError."""
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"tokenizer.json cannot be read: {error}") from error
        _add_configured_tokens(backend, config)
    elif any((folder / name).is_file() for name in _SLOW_FILES):
        backend = _convert_slow(folder)
    else:
        return None
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    special = {name: _content(named[name]) for name in _NAMED_TOKENS if named.get(name)}
    source = _read_template(folder, config)
    return Tokenizer(backend, None if source is None else ChatTemplate(source, special))


def _special_ids(backend: Backend) -> set[int]:
    return {i for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _add_configured_tokens(backend: Backend, config: dict[str, Any]) -> None:
    """Tokens that tokenizer_config.json adds to tokenizer.json (mask tokens are often added so)."""
    known = backend.get_added_tokens_decoder()
    for key, fields in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if int(key) in known:
            continue
        flags = {name: bool(fields.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        token = AddedToken(fields["content"], **flags)
        (backend.add_special_tokens if flags["special"] else backend.add_tokens)([token])
        if backend.token_to_id(fields["content"]) != int(key):
            raise ModelError(f"tokenizer_config.json and tokenizer.json disagree on the id of {fields['content']!r}")


def _convert_slow(folder: Path) -> Backend:
    done = subprocess.run([sys.executable, "-c", _CONVERT, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["unknown error"])[-1]
        raise ModelError(f"the checkpoint's tokenizer cannot be loaded: {reason}")
    return Backend.from_str(done.stdout)


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} does not hold an object")
    return value


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
