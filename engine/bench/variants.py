"""The ways of decoding a Qwen2.5-7B that are measured side by side: blocks of two families, verified drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..core import EngineCore
from ..decoding.parameters import resolve
from ..params import DecodingParams, ParameterValue
from .paced import Pace, acceptance, cycle_of, refinements

Asked = dict[str, ParameterValue]
GRID: Asked = {"strategy": "static"}


@dataclass(frozen=True)
class Variant:
    """A shape with random weights, and its modes: name -> `diffusion` objects. block: instead of the shape's own."""

    name: str
    shape: str
    block: int | None = None
    modes: dict[str, Asked] = field(default_factory=lambda: {"whole blocks": GRID})


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            "fast-dllm-v2",
            "fast-dllm-v2-7b",
            modes={
                "block 32, sub-block 8": GRID,
                "block 32, sub-block 8, its cache": {**GRID, "sub_block_cache": True},
            },
        ),
        Variant("sdar-4", "sdar-7b", 4, {"block 4": GRID}),
        Variant("sdar-8", "sdar-7b", 8, {"block 8": GRID}),
        Variant(
            "converted",
            "converted-7b",
            modes={
                "verify, 4 drafts": {"strategy": "verify", "draft_length": 4},
                "autoregressive": {"strategy": "autoregressive"},
            },
        ),
    )
}


@dataclass(frozen=True)
class Paced:
    """A mode at a number of tokens a forward. probability: with which the engine takes a draft for right; cycle: see
    `cycle_of`."""

    mode: str
    wanted: float
    decoding: DecodingParams
    probability: float
    cycle: int


def paced(core: EngineCore, mode: str, asked: Asked, tokens: float) -> Paced:
    """The mode at about `tokens` tokens a forward of each sequence."""
    values: dict[str, Any] = dict(asked)
    probability = 0.0
    if asked["strategy"] == "static":
        values["denoising_steps"] = refinements(tokens, core.traits.block_size, core.traits)
    elif asked["strategy"] == "verify":
        probability = acceptance(tokens, int(asked["draft_length"]))
    decoding = resolve(core.info, values)
    return Paced(mode, tokens, decoding, probability, cycle_of(decoding.values, core.traits))


def paces(core: EngineCore, variant: Variant, wanted: list[float]) -> Iterator[Paced]:
    """Every mode at every pace that it can have."""
    for mode, asked in variant.modes.items():
        for tokens in wanted if asked["strategy"] != "autoregressive" else wanted[:1]:
            if tokens <= most_tokens(core, asked):
                yield paced(core, mode, asked, tokens)


def most_tokens(core: EngineCore, asked: Asked) -> float:
    """Tokens a forward that the mode has at most."""
    if asked["strategy"] == "verify":
        return int(asked["draft_length"]) + 1
    return 1 if asked["strategy"] == "autoregressive" else core.traits.block_size


def first_of(pace: Pace, paced: Paced) -> DecodingParams:
    """Set the engine to a pace; what its requests ask for."""
    pace.accept(paced.wanted - 1, paced.probability)
    return paced.decoding
