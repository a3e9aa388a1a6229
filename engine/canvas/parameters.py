"""The parameters of the canvas samplers. Imports no torch: the server validates with them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ..decoding.description import StrategyInfo, parameters_of

# A noise word holds the step in its lower 16 bits and the candidate above them.
MAX_STEPS, MAX_CANDIDATES = 4096, 16

Steps = Annotated[int, Meta(ge=1, le=MAX_STEPS, description="denoising steps from the empty canvas to the text")]
Scale = Annotated[float, Meta(ge=0.0, le=1000.0)]


class AncestralParams(msgspec.Struct, frozen=True):
    """Ancestral sampling (MDLM, arXiv 2406.07524): each step decides a random part of the masks."""

    steps: Steps = 16


class GuidedParams(msgspec.Struct, frozen=True):
    """Reward-guided ancestral sampling (DiDi-Instruct, arXiv 2509.25035): see `guided.py`."""

    steps: Steps = 16
    guidance_scale_start: Annotated[Scale, Meta(description="weight of the reward's gradient at the first step")] = 30.0
    guidance_scale_end: Annotated[Scale, Meta(description="and at the last step that is tilted by it")] = 40.0
    num_candidates: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES, description="drawn at a step that re-ranks")] = 4
    rerank_steps_ratio: Annotated[
        float, Meta(ge=0.0, le=1.0, description="part of the steps, the last, that re-rank")
    ] = 0.5


def describe_samplers(canvas: bool, reward: bool) -> list[StrategyInfo]:
    """Both samplers as they are on a model. canvas: it is one of a fixed canvas; reward: it has a discriminator."""
    elsewhere = "" if canvas else "it is for models of a fixed canvas"
    without = "" if reward else "the model folder holds no discriminator that could guide"
    found = (
        ("ancestral", AncestralParams, "MDLM, arXiv 2406.07524", elsewhere),
        ("guided", GuidedParams, "DiDi-Instruct, arXiv 2509.25035", elsewhere or without),
    )
    return [
        StrategyInfo(
            name=name,
            summary=(struct.__doc__ or "").strip(),
            source=source,
            parameters=parameters_of(struct),
            refusal=refusal,
        )
        for name, struct, source, refusal in found
    ]
