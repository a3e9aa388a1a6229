"""The converted folder: Hugging Face layout, as the engine (and, where the family has one, its own code) reads it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from linocut.engine.errors import ConfigError, ModelError
from linocut.engine.loading import read_config

from .adapter import DRAFT_PREFIX, MASK_EMBEDDING, layer_adapters, merge_adapter, save_adapter
from .backbone import DecoderWeights, hugging_face_tensors, load_decoder
from .network import FULL_PREFIX
from .settings import AdaptSettings

ADAPTER_FILE = "adapter.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_REPLACED = {"config.json", "README.md", INDEX_FILE, "complete.json", ADAPTER_FILE}
_LAYOUTS = {"fast-dllm-v2": ("qwen2", "Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", "bd_size")}
_LAYOUTS["sdar"] = ("qwen3", "sdar", "SDARForCausalLM", "block_size")


def find_mask_id(settings: AdaptSettings, config: dict[str, Any]) -> int:
    """The mask token: the setting, or what config.json names. Raises ConfigError."""
    named = (settings.mask_token_id, (config.get("linocut") or {}).get("mask_token_id"), config.get("mask_token_id"))
    mask = next((int(value) for value in named if value is not None), None)
    if mask is None:
        raise ConfigError("name a mask_token_id: an id that no text uses")
    if not 0 <= mask < int(config["vocab_size"]):
        raise ConfigError(f"mask_token_id {mask} is not in the vocabulary of {config['vocab_size']}")
    return mask


def converted_config(settings: AdaptSettings, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the converted folder. Raises ConfigError where the layout does not fit the base."""
    s, mask = settings, find_mask_id(settings, config)
    banned = s.banned_ids if s.banned_ids is not None else (config.get("linocut") or {}).get("banned_ids", [])
    banned = sorted({*banned, mask})
    converted = {name: value for name, value in config.items() if name != "linocut"}
    if s.layout != "linocut":
        base, model_type, architecture, block_key = _LAYOUTS[s.layout]
        if str(config.get("model_type")).lower() != base:
            raise ConfigError(f"the layout {s.layout} needs a {base} base, not {config.get('model_type')}")
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope:  # the families' own code reads the older name
            converted["rope_theta"] = rope["rope_theta"]
        converted |= {"model_type": model_type, "architectures": [architecture], block_key: s.block_size}
        return converted | {"mask_token_id": mask, "linocut": {"banned_ids": banned}}
    own: dict[str, Any] = {
        "context": s.context,
        "logit_source": s.logit_source,
        "block_size": s.block_size,
        "mask_token_id": mask,
        "banned_ids": banned,
    }
    if s.mode == "gated":
        own["adapter"] = {"rank": s.rank, "gate": "noisy"}
    return converted | {"linocut": own}


def export(settings: AdaptSettings, trained: dict[str, Tensor]) -> Path:
    """Write the converted folder, settings.output, and return it.

    trained: master values by name, as in `FlatParameters.masters`. Gated: the base's weight files are copied untouched
    beside adapter.safetensors. Otherwise the trained (or merged) weights are written in the base's own dtype, the mask
    embedding in the row of the mask token. Raises ConfigError or ModelError.
    """
    base, folder = Path(settings.base), Path(settings.output)
    if folder.resolve() == base.resolve():
        raise ConfigError("the output folder is the base model's own")
    config, _ = read_config(base)
    converted = converted_config(settings, config)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _REPLACED:
            shutil.copyfile(path, folder / path.name)
    if settings.mode == "gated":
        for path in sorted(base.glob("model*.safetensors*")):
            _copy_once(path, folder / path.name)
        save_adapter(trained, settings.scale, folder / ADAPTER_FILE, _stored_dtype(settings))
    else:
        _write_weights(settings, config, trained, folder)
        heads = {name: tensor for name, tensor in trained.items() if name.startswith(DRAFT_PREFIX)}
        if heads:
            save_adapter(heads, 1.0, folder / ADAPTER_FILE, _stored_dtype(settings))
        else:  # an earlier export's would be loaded on top of these weights
            (folder / ADAPTER_FILE).unlink(missing_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(converted, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(settings, converted), encoding="utf-8")
    return folder


def _stored_dtype(settings: AdaptSettings) -> torch.dtype:
    return torch.float32 if settings.dtype in ("float32", "float64") else torch.bfloat16


def _copy_once(source: Path, target: Path) -> None:
    """Copy a large file unless its copy, of the same size and time, is already there.

    Merged weights of an earlier export have the original's size, but not its time.
    """
    here, there = source.stat(), target.stat() if target.exists() else None
    if there is None or (there.st_size, there.st_mtime_ns) != (here.st_size, here.st_mtime_ns):
        part = target.with_name(f"{target.name}.partial")
        shutil.copyfile(source, part)
        os.utime(part, ns=(here.st_atime_ns, here.st_mtime_ns))
        part.replace(target)


def _write_weights(settings: AdaptSettings, config: dict[str, Any], trained: dict[str, Tensor], folder: Path) -> None:
    decoder = load_decoder(Path(settings.base), torch.float32, torch.device("cpu"))
    own = {name: tensor.detach().float().cpu() for name, tensor in trained.items()}
    if settings.mode == "full":
        decoder = decoder.with_tensors(
            {n.removeprefix(FULL_PREFIX): t for n, t in own.items() if n.startswith(FULL_PREFIX)}
        )
    else:
        decoder = merge_adapter(decoder, layer_adapters(own, decoder.backbone.layers), settings.scale)
    tensors = _with_mask_row(decoder, own[MASK_EMBEDDING], find_mask_id(settings, config))
    dtype = getattr(torch, decoder.backbone.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"config.json names the dtype {decoder.backbone.dtype!r}, which no weights are written in")
    part = folder / "model.safetensors.partial"
    save_file({n: t.to(dtype).contiguous().clone() for n, t in tensors.items()}, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")


def _with_mask_row(decoder: DecoderWeights, mask_embedding: Tensor, mask_id: int) -> dict[str, Tensor]:
    tensors = dict(hugging_face_tensors(decoder))
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][mask_id] = mask_embedding
    return tensors


def model_card(settings: AdaptSettings, config: dict[str, Any]) -> str:
    """A short README.md; whoever publishes the model replaces it by a full one."""
    s = settings
    how = {
        "gated": f"The original weights are untouched; an adapter of rank {s.rank} acts on masked rows only.",
        "lora": f"A low-rank update of rank {s.rank} was trained and merged into all layers.",
        "full": "All weights were trained.",
    }[s.mode]
    name = Path(s.base).name
    return (
        f"# {name}, converted to block diffusion\n\nMade with `linocut convert` from `{name}` "
        f"(model type {config['model_type']}).\n\n{how} Context: {s.context}. Logit source: {s.logit_source}. "
        f"Default block: {s.block_size}. Segment lengths in training: {', '.join(map(str, s.segments))}.\n"
    )
