"""What a canvas model looks like, read from its config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError

# GPT-2's vocabulary with a mask id behind it, as MDLM and DiDi-Instruct have it, and its <|endoftext|>.
_GPT2_VOCAB, _GPT2_END = 50258, 50256


@dataclass(frozen=True)
class CanvasShape:
    """A diffusion transformer (DDiT) over `length` positions.

    cond: width of the time conditioning. time_conditioning: whether the denoiser is told the noise level; if not, it is
    always told 0, except where it is guided. begin_id: what every canvas began with in training, None where that is
    not known.
    """

    length: int
    hidden: int
    cond: int
    layers: int
    heads: int
    vocab: int
    mask_id: int
    begin_id: int | None
    stop_ids: tuple[int, ...]
    time_conditioning: bool
    dtype: str = "float32"  # of the checkpoint, torch's name

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def max_model_len(self) -> int:
        """Prompt plus answer. The begin id has a position, but is neither."""
        return self.length - (self.begin_id is not None)


def is_canvas(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a canvas model: MDLM's, or DiDi-Instruct's, which is nested and has no model_type."""
    return str(config.get("model_type", "")).lower() == "mdlm" or "n_blocks" in _section(_nested(config), "model")


def canvas_from_config(
    config: Mapping[str, Any], mask_id: int | None = None, stop_ids: tuple[int, ...] | None = None
) -> CanvasShape:
    """Read a config.json for which `is_canvas` holds. `mask_id` and `stop_ids` replace what it says. Raises ModelError.

    MDLM names sizes at the top; DiDi-Instruct keeps its training configuration, with sections `model` and `algo`, at
    the top or under `config`. The mask is the last id of the vocabulary unless `mask_token_id` says otherwise.
    """
    nested = _nested(config)
    flat = str(config.get("model_type", "")).lower() == "mdlm"
    sizes: Mapping[str, Any] = config if flat else _section(nested, "model")
    algo: Mapping[str, Any] = config if flat else _section(nested, "algo")
    if algo.get("causal_attention"):
        raise ModelError("a causal canvas model (causal_attention) is not supported")
    if algo.get("parameterization", "subs") != "subs":
        raise ModelError(f"parameterization {algo['parameterization']!r} is not supported (subs is)")
    vocab = _size({**nested, **config}, "vocab_size")
    gpt2 = vocab == _GPT2_VOCAB
    named = config.get("mask_token_id")
    mask = mask_id if mask_id is not None else vocab - 1 if named is None else int(named)
    begin = config.get("bos_token_id", _GPT2_END if gpt2 else None)
    ends = config.get("eos_token_id", _GPT2_END if gpt2 else None)
    stops = stop_ids if stop_ids is not None else _ids(ends)
    if any(not 0 <= i < vocab for i in (mask, *([] if begin is None else [begin]), *stops)):
        raise ModelError(f"mask id {mask}, begin id {begin} or stop ids {stops} are not in the vocabulary of {vocab}")
    shape = CanvasShape(
        length=_size(sizes, "model_length" if flat else "length"),
        hidden=_size(sizes, "hidden_dim" if flat else "hidden_size"),
        cond=_size(sizes, "cond_dim"),
        layers=_size(sizes, "n_blocks"),
        heads=_size(sizes, "n_heads"),
        vocab=vocab,
        mask_id=mask,
        begin_id=begin,
        stop_ids=stops,
        time_conditioning=bool(algo.get("time_conditioning", False)),
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch."),
    )
    if shape.hidden % shape.heads or shape.head_dim % 2:
        raise ModelError(f"{shape.heads} attention heads do not divide a hidden size of {shape.hidden} into even parts")
    if shape.max_model_len < 2:
        raise ModelError(f"a canvas of {shape.length} positions holds no text")
    return shape


def _nested(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("config")
    return inner if isinstance(inner, dict) else config


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json has no size {name!r}" if value is None else f"config.json: {name} is {value!r}")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
