"""What a request asks of the engine: sampling and decoding parameters.

These are wire types (msgspec) and import no torch, so that the server validates a request before it is scheduled.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a sequence ends. Everything is resolved: no field means "default" here.

    temperature: 0 is greedy. top_k: 0 is off. seed: 64 bits; the server draws one when the client gave none.
    stop_token_ids: further stops beside the family's; they end the text and stay out of it.
    min_tokens: stop ids are banned at the first `min_tokens` generated positions. ignore_eos bans the family's stop
    ids at every position.
    """

    max_tokens: Annotated[int, Meta(ge=1)]
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: Annotated[int, Meta(ge=0)] = 0


ParameterValue = bool | int | float | str


class DecodingParams(msgspec.Struct, frozen=True, kw_only=True):
    """A strategy's name and its complete, validated parameters (see `decoding.parameters.resolve`)."""

    strategy: str
    values: dict[str, ParameterValue] = {}
