"""The parameters of every strategy, as data: names, types, bounds, defaults.

Imports no torch: the server validates a request's `diffusion` object here, before anything is scheduled.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from ..canvas.parameters import AncestralParams, GuidedParams
from ..errors import ParameterError
from ..family import FamilyTraits
from ..params import DecodingParams, ParameterValue


class Traits(Protocol):
    """What decides whether a strategy is valid on a model: `FamilyTraits` and `ModelInfo` both have it."""

    @property
    def context(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def mask_id(self) -> int | None: ...
    @property
    def reward(self) -> bool: ...


class StaticParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Commit a fixed number of positions per forward (MaskGIT schedule; SDAR `low_confidence_static`, `sequential`)."""

    denoising_steps: Annotated[int, Meta(ge=1, description="forwards a block takes; default: its length")] | None = None
    order: Annotated[Literal["confidence", "sequential"], Meta(description="best first, or left to right")] = (
        "confidence"
    )
    confidence: Annotated[
        Literal["tempered", "filtered"],
        Meta(description="probability before, or after, top-k/top-p/min-p (renormalised)"),
    ] = "tempered"
    sub_block_size: Annotated[int, Meta(ge=1, description="positions refined together; divides the block")] | None = (
        None
    )
    sub_block_cache: Annotated[
        bool,
        Meta(description="refine a sub-block on stale K/V of the others: approximate, and a preemption may change it"),
    ] = False


class ThresholdParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Commit every position whose confidence exceeds `threshold`, at least what the schedule asks for.

    Fast-dLLM v2 (`generate`), SDAR `low_confidence_dynamic`. The schedule's floor is one position per forward unless
    `denoising_steps` is less than the block.
    """

    threshold: Annotated[float, Meta(ge=0.0, le=1.0, description="commit if confidence > threshold")] = 0.9
    denoising_steps: (
        Annotated[int, Meta(ge=1, description="schedule that sets the floor; default: block length")] | None
    ) = None
    confidence: Annotated[
        Literal["tempered", "filtered"],
        Meta(description="probability before, or after, top-k/top-p/min-p (renormalised)"),
    ] = "tempered"
    sub_block_size: Annotated[int, Meta(ge=1, description="positions refined together; divides the block")] | None = (
        None
    )
    sub_block_cache: Annotated[
        bool,
        Meta(description="refine a sub-block on stale K/V of the others: approximate, and a preemption may change it"),
    ] = False


class AutoregressiveParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token a forward, left to right."""


class JacobiParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Jacobi decoding (Jacobi Forcing, arXiv 2512.14681): the autoregressive text in fewer forwards."""

    draft_length: Annotated[int, Meta(ge=2, le=256, description="rows fed a forward, the last token included")] = 16


class VerifyParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Drafts from masks, verified by the clean rows of the next forward: the autoregressive text in fewer forwards."""

    draft_length: Annotated[int, Meta(ge=1, le=12, description="masks of a draft; default: the block size")] | None = (
        None
    )
    row_cost: (
        Annotated[
            float,
            Meta(
                ge=0.0,
                le=1.0,
                description="what a row must promise, in tokens, to be run; 0 runs all; default: by device and load",
            ),
        ]
        | None
    ) = None


PARAMETERS: dict[str, type[msgspec.Struct]] = {
    "static": StaticParams,
    "threshold": ThresholdParams,
    "autoregressive": AutoregressiveParams,
    "jacobi": JacobiParams,
    "verify": VerifyParams,
    "ancestral": AncestralParams,
    "guided": GuidedParams,
}

# Strategies whose rows go on from the last token, wherever it is; those of the others lie on the grid of blocks.
FRONTIER = frozenset({"autoregressive", "jacobi", "verify"})
MAX_DRAFT = 12


def strategies_for(traits: Traits) -> tuple[str, ...]:
    """Names of the strategies that are valid on a model, the family's default first."""
    if traits.context == "canvas":
        return ("guided", "ancestral") if traits.reward else ("ancestral",)
    if traits.mask_id is None:
        return ("autoregressive", "jacobi")
    if traits.context == "token-causal":
        return ("verify", "threshold", "static", "autoregressive", "jacobi")
    return ("threshold", "static")


def first_rows(decoding: DecodingParams, traits: FamilyTraits) -> tuple[int, int]:
    """(rows that a sequence's first step feeds from its last token on, rows of a draft segment); 0 where neither is."""
    if decoding.strategy not in FRONTIER:
        return 0, 0
    length = int(decoding.values.get("draft_length", 1))
    if decoding.strategy == "verify":
        return 1, segment_rows(length, traits)
    return length, 0


def segment_rows(draft_length: int, traits: FamilyTraits) -> int:
    """Masks that propose `draft_length` tokens behind the next one: unshifted, the first one would propose that one."""
    return draft_length + (1 if traits.logit_source == "own" else 0)


def resolve(
    traits: Traits,
    requested: dict[str, Any] | None,
    default_strategy: str | None = None,
    default_values: dict[str, ParameterValue] | None = None,
) -> DecodingParams:
    """Turn a request's `diffusion` object into complete parameters.

    `requested` is {"strategy": name, **parameters} or None; the operator's defaults fill what it leaves out, where they
    belong to the strategy in use. Raises ParameterError naming `diffusion.<field>`.
    """
    asked = dict(requested or {})
    valid = strategies_for(traits)
    default = default_strategy or valid[0]
    name = asked.pop("strategy", None)
    name = default if name is None else name
    if not isinstance(name, str) or name not in PARAMETERS:
        known = ", ".join(sorted(PARAMETERS))
        raise ParameterError("diffusion.strategy", f"unknown strategy {str(name)[:64]!r} (known: {known})")
    if name not in valid:
        why = f"strategy {name!r} is not valid on this {traits.context} model (valid: {', '.join(valid)})"
        raise ParameterError("diffusion.strategy", why)
    cls = PARAMETERS[name]
    fields = {f.name: f for f in msgspec.structs.fields(cls)}
    base = {k: v for k, v in (default_values or {}).items() if name == default and k in fields}
    merged = {**base, **{k: v for k, v in asked.items() if v is not None}}
    for key, value in merged.items():
        if key not in fields:
            allowed = ", ".join(fields) or "none"
            raise ParameterError(f"diffusion.{key}"[:80], f"unknown parameter of strategy {name!r} (it has: {allowed})")
        try:
            msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            raise ParameterError(f"diffusion.{key}", str(error)[:200]) from None
    params = msgspec.convert(merged, cls)
    values: dict[str, ParameterValue] = {k: v for k, v in msgspec.structs.asdict(params).items() if v is not None}
    if name == "verify":
        values.setdefault("draft_length", min(max(traits.block_size, 1), MAX_DRAFT))
    _check_block(traits, values)
    return DecodingParams(strategy=name, values=values)


def _check_block(traits: Traits, values: dict[str, ParameterValue]) -> None:
    size = values.get("sub_block_size")
    if isinstance(size, int) and (size > traits.block_size or traits.block_size % size):
        raise ParameterError("diffusion.sub_block_size", f"must divide the model's block size {traits.block_size}")
    if values.get("sub_block_cache") and traits.context == "token-causal":
        why = "applies to block-causal models: here decided tokens are final as soon as all before them are"
        raise ParameterError("diffusion.sub_block_cache", why)
    steps = values.get("denoising_steps")
    if isinstance(steps, int) and steps > traits.block_size:
        raise ParameterError("diffusion.denoising_steps", f"must not exceed the model's block size {traits.block_size}")
