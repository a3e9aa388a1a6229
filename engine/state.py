"""Row state on the device: slot-indexed tensors from which every forward is derived.

The host writes a row at admission and grants it pages; from then on tensor functions advance it, so that a later step
can be enqueued before the host has seen the outcome of this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Admission, PageGrant

_INT = torch.int32

# Positions behind a new row that hold draft ids; at least the longest draft_length.
FIRST_DRAFT = 256


@dataclass
class RowState:
    """State of `rows` slots; `length` positions each. Integers are int32 unless noted.

    tokens, decided: [rows, length]. Undecided positions hold the mask id, or a draft.
    prompt_len, start, final_len, step, limit: [rows]; see `Sequence`.
    fresh: [rows] bool, the active block's slots hold K/V of a whole-block forward (sub-block cache).
    finish: [rows], 0 running, 1 stop id, 2 max_tokens.
    stops: [rows, K] ids that end the text, padded with -1; stops_from: [rows, K] the position below which each is
        banned (min_tokens; for ignore_eos the family's are banned up to `limit`).
    page_table: [rows, pages].
    parameters: strategy parameter name -> [rows].
    """

    tokens: Tensor
    decided: Tensor
    prompt_len: Tensor
    start: Tensor
    final_len: Tensor
    step: Tensor
    limit: Tensor
    fresh: Tensor
    finish: Tensor
    stops: Tensor
    stops_from: Tensor
    page_table: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seed: Tensor
    choice: Tensor
    parameters: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.tokens.device


# Every numeric strategy parameter as a column: name -> (dtype, value where a strategy leaves it out). Texts are coded.
PARAMETER_COLUMNS: dict[str, tuple[torch.dtype, float]] = {
    "threshold": (torch.float32, 1.0),
    "denoising_steps": (_INT, 0),
    "sub_block_size": (_INT, 0),
    "sub_block_cache": (torch.bool, 0),
    "confidence": (torch.bool, 0),
    "order": (torch.bool, 0),
    "draft_length": (_INT, 1),
}
_CODES: dict[str, dict[str, int]] = {
    "confidence": {"tempered": 0, "filtered": 1},
    "order": {"confidence": 0, "sequential": 1},
}


def allocate_state(rows: int, length: int, pages: int, device: torch.device) -> RowState:
    """Zeroed state for `rows` slots of `length` positions over page tables of `pages` entries."""

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=_INT, device=device)

    def floats() -> Tensor:
        return torch.zeros(rows, dtype=torch.float32, device=device)

    return RowState(
        tokens=ints(rows, length),
        decided=torch.zeros((rows, length), dtype=torch.bool, device=device),
        prompt_len=ints(rows),
        start=ints(rows),
        final_len=ints(rows),
        step=ints(rows),
        limit=ints(rows),
        fresh=torch.zeros(rows, dtype=torch.bool, device=device),
        finish=ints(rows),
        stops=torch.full((rows, 4), -1, dtype=_INT, device=device),
        stops_from=ints(rows, 4),
        page_table=ints(rows, pages),
        temperature=floats(),
        top_p=floats(),
        top_k=ints(rows),
        min_p=floats(),
        seed=torch.zeros(rows, dtype=torch.int64, device=device),
        choice=ints(rows),
        parameters={
            name: torch.full((rows,), value, dtype=dtype, device=device)
            for name, (dtype, value) in PARAMETER_COLUMNS.items()
        },
    )


def admit_rows(state: RowState, admissions: list[Admission], stop_ids: tuple[int, ...], mask_id: int | None) -> None:
    """Write the rows of `admissions`. `stop_ids` are the family's.

    The mask id stands at undecided positions; without one, the row's own tokens do, as the first draft.
    """
    for row in admissions:
        slot, sampling = row.slot, row.sampling
        known = len(row.tokens)
        ids = [*row.tokens, *row.window[max(known - row.start, 0) :]]
        if mask_id is None:
            ids = (row.tokens * (1 + FIRST_DRAFT // known))[: known + FIRST_DRAFT]
        else:
            state.tokens[slot].fill_(mask_id)
        state.tokens[slot, : len(ids)] = torch.tensor(ids, dtype=_INT)
        state.decided[slot].fill_(False)
        state.decided[slot, :known] = True
        if row.decided:
            state.decided[slot, row.start : row.start + len(row.decided)] = torch.tensor(row.decided)
        limit, minimum = row.prompt_len + sampling.max_tokens, row.prompt_len + sampling.min_tokens
        stops = {stop: limit if sampling.ignore_eos else minimum for stop in stop_ids}
        stops |= {stop: minimum for stop in sampling.stop_token_ids}
        _ensure_stop_columns(state, len(stops))
        state.stops[slot].fill_(-1)
        state.stops[slot, : len(stops)] = torch.tensor(list(stops), dtype=_INT)
        state.stops_from[slot, : len(stops)] = torch.tensor(list(stops.values()), dtype=_INT)
        state.prompt_len[slot] = row.prompt_len
        state.start[slot] = row.start
        state.final_len[slot] = row.final_len
        state.step[slot] = row.step
        state.limit[slot] = limit
        state.fresh[slot] = False
        state.finish[slot] = 0
        state.temperature[slot] = sampling.temperature
        state.top_p[slot] = sampling.top_p
        state.top_k[slot] = min(sampling.top_k, torch.iinfo(_INT).max)
        state.min_p[slot] = sampling.min_p
        state.seed[slot] = _signed(sampling.seed)
        state.choice[slot] = row.choice
        for name, (_, default) in PARAMETER_COLUMNS.items():
            value = row.decoding.values.get(name, default)
            state.parameters[name][slot] = _CODES[name].get(value, 0) if isinstance(value, str) else value


def grant_pages(state: RowState, grants: list[PageGrant]) -> None:
    """Append pages to rows' tables."""
    for grant in grants:
        end = grant.first + len(grant.pages)
        state.page_table[grant.slot, grant.first : end] = torch.tensor(grant.pages, dtype=_INT)


def _signed(seed: int) -> int:
    """The 64-bit seed as torch stores it."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def _ensure_stop_columns(state: RowState, count: int) -> None:
    missing = count - state.stops.shape[1]
    if missing > 0:
        pad = torch.full((state.stops.shape[0], missing), -1, dtype=_INT, device=state.device)
        state.stops = torch.cat([state.stops, pad], dim=1)
        state.stops_from = torch.cat([state.stops_from, torch.zeros_like(pad)], dim=1)
