"""Row state on the device: slot-indexed tensors from which every forward is derived.

The host writes a row at admission and grants it pages; from then on tensor functions advance it, so that a later step
can be enqueued before the host has seen the outcome of this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .decoding.columns import Parameters
from .decoding.registry import columns, strategy_classes
from .decoding.strategies.verify import MAX_DRAFT
from .params import SamplingParams
from .plan import Admission, PageGrant

_INT = torch.int32

# Positions behind a new row that hold draft ids; at least the longest draft_length.
FIRST_DRAFT = 256


@dataclass
class RowState:
    """State of `rows` slots; `length` positions each. Integers are int32 unless noted.

    tokens, decided: [rows, length]. Undecided positions hold the mask id, or a draft.
    prompt_len, start, final_len, step, limit: [rows]; see `Sequence`. block, window, origin, canvas: [rows]; see
        `Geometry`.
    fresh: [rows] bool, the active block's slots hold K/V of a whole-block forward (sub-block cache). finished: [rows]
        bool, the text has ended; the row runs nothing any more.
    drafts: [rows], drafts of masks that stand behind `start`; draft_confidence: [rows, MAX_DRAFT] float32. row_cost:
        [rows] float32, what a row of the coming step must promise (the parameter of that name, or what the load says).
    stops: [rows, K] ids that end the text, padded with -1; stops_from: [rows, K] the position below which each is
        banned (min_tokens; for ignore_eos the family's are banned everywhere). Ids that a row's strategy must not say
        stand there, too, banned everywhere.
    page_table: [rows, pages].
    parameters: strategy parameter name -> [rows]. memory: what strategies keep of their rows, name -> [rows, ...].
    """

    tokens: Tensor
    decided: Tensor
    prompt_len: Tensor
    start: Tensor
    final_len: Tensor
    step: Tensor
    limit: Tensor
    block: Tensor
    window: Tensor
    origin: Tensor
    canvas: Tensor
    fresh: Tensor
    finished: Tensor
    drafts: Tensor
    draft_confidence: Tensor
    row_cost: Tensor
    stops: Tensor
    stops_from: Tensor
    page_table: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seed: Tensor
    choice: Tensor
    parameters: Parameters
    memory: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.tokens.device


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
        block=ints(rows),
        window=ints(rows),
        origin=ints(rows),
        canvas=ints(rows),
        fresh=torch.zeros(rows, dtype=torch.bool, device=device),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
        drafts=ints(rows),
        draft_confidence=torch.zeros((rows, MAX_DRAFT), dtype=torch.float32, device=device),
        row_cost=floats(),
        stops=torch.full((rows, 4), -1, dtype=_INT, device=device),
        stops_from=ints(rows, 4),
        page_table=ints(rows, pages),
        temperature=floats(),
        top_p=floats(),
        top_k=ints(rows),
        min_p=floats(),
        seed=torch.zeros(rows, dtype=torch.int64, device=device),
        choice=ints(rows),
        parameters=Parameters(
            columns(),
            torch.full((rows, columns().numbers), -1.0, device=device),
            ints(rows, columns().integers),
        ),
        memory={},
    )


def admit_rows(
    state: RowState,
    admissions: list[Admission],
    stop_ids: tuple[int, ...],
    mask_id: int | None,
    edit_ids: tuple[int, ...] = (),
) -> None:
    """Write the rows of `admissions`. `stop_ids` and `edit_ids` are the family's.

    The mask id stands at undecided positions of a block; on a frontier the row's own tokens do, as a first draft.
    """
    if not admissions:
        return
    slots = _to_device(torch.tensor([row.slot for row in admissions]), state.device)

    def write(column: Tensor, values: Tensor) -> None:
        column.index_copy_(0, slots, _to_device(values.to(column.dtype), state.device))

    def write_list(column: Tensor, values: list[Any]) -> None:
        write(column, torch.tensor(values, dtype=column.dtype))

    tokens, decided = _initial_tokens(admissions, state.tokens.shape[1], mask_id)
    write(state.tokens, tokens)
    write(state.decided, decided)
    stops, stops_from = _stop_table(admissions, stop_ids, edit_ids)
    _ensure_stop_columns(state, stops.shape[1])
    write(state.stops, pad(stops, (0, state.stops.shape[1] - stops.shape[1]), value=-1))
    write(state.stops_from, pad(stops_from, (0, state.stops.shape[1] - stops.shape[1])))
    sampling = [row.sampling for row in admissions]
    write_list(state.prompt_len, [row.prompt_len for row in admissions])
    write_list(state.start, [row.start for row in admissions])
    write_list(state.final_len, [row.final_len for row in admissions])
    write_list(state.step, [row.step for row in admissions])
    write_list(state.limit, [row.limit for row in admissions])
    write_list(state.block, [row.geometry.block for row in admissions])
    write_list(state.window, [row.geometry.window for row in admissions])
    write_list(state.origin, [row.geometry.origin for row in admissions])
    write_list(state.canvas, [row.geometry.canvas for row in admissions])
    write_list(state.fresh, [False] * len(admissions))
    write_list(state.finished, [False] * len(admissions))
    write_list(state.drafts, [0] * len(admissions))
    write_list(state.row_cost, [0.0] * len(admissions))
    write_list(state.temperature, [0.0 if is_greedy(s) else s.temperature for s in sampling])
    write_list(state.top_p, [s.top_p for s in sampling])
    write_list(state.top_k, [min(s.top_k, torch.iinfo(_INT).max) for s in sampling])
    write_list(state.min_p, [s.min_p for s in sampling])
    write_list(state.seed, [signed_seed(s.seed) for s in sampling])
    write_list(state.choice, [row.choice for row in admissions])
    numbers, integers = state.parameters.columns.encode([row.decoding.values for row in admissions])
    write(state.parameters.numbers, numbers)
    write(state.parameters.integers, integers)
    for kept in state.memory.values():
        kept.index_fill_(0, slots, 0)


def is_greedy(sampling: SamplingParams) -> bool:
    """Temperatures below this leave nothing to chance, and their reciprocal would leave float32."""
    return sampling.temperature < 1e-5


def grant_pages(state: RowState, grants: list[PageGrant]) -> None:
    """Append pages to rows' tables."""
    if not grants:
        return
    entries = [(g.slot, g.first + i, page) for g in grants for i, page in enumerate(g.pages)]
    table = _to_device(torch.tensor(entries, dtype=torch.int64).reshape(-1, 3), state.device)
    state.page_table.index_put_((table[:, 0], table[:, 1]), table[:, 2].to(_INT))


def _initial_tokens(admissions: list[Admission], length: int, mask_id: int | None) -> tuple[Tensor, Tensor]:
    """[rows, length] ids and flags of new rows."""
    tokens = torch.full((len(admissions), length), mask_id or 0, dtype=_INT)
    decided = torch.zeros((len(admissions), length), dtype=torch.bool)
    for index, row in enumerate(admissions):
        known = len(row.tokens)
        if mask_id is None or row.geometry.refeeds:
            ids = (row.tokens * (2 + FIRST_DRAFT // known))[: known + FIRST_DRAFT]
        else:
            ids = [*row.tokens, *row.window[max(known - row.start, 0) :]]
        tokens[index, : len(ids)] = torch.tensor(ids, dtype=_INT)
        decided[index, :known] = True
        if row.decided:
            decided[index, row.start : row.start + len(row.decided)] = torch.tensor(row.decided)
        if row.suffix:
            tokens[index, row.limit : row.limit + len(row.suffix)] = torch.tensor(row.suffix, dtype=_INT)
            decided[index, row.limit : row.limit + len(row.suffix)] = True
    return tokens, decided


def _stop_table(
    admissions: list[Admission], stop_ids: tuple[int, ...], edit_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """[rows, K] stop ids, -1 where there is none, and the position below which each is banned."""
    rows, classes = [], strategy_classes()
    for row in admissions:
        minimum = row.prompt_len + row.sampling.min_tokens
        # Behind max_tokens too: what stands there has its say in the block.
        stops = {stop: torch.iinfo(_INT).max if row.sampling.ignore_eos else minimum for stop in stop_ids}
        stops |= {stop: minimum for stop in row.sampling.stop_token_ids}
        if not classes[row.decoding.strategy].edits:
            stops |= dict.fromkeys(edit_ids, torch.iinfo(_INT).max)
        rows.append(stops)
    width = max(1, *(len(stops) for stops in rows)) if rows else 1
    ids = torch.tensor([[*stops, *[-1] * (width - len(stops))] for stops in rows], dtype=_INT)
    below = torch.tensor([[*stops.values(), *[0] * (width - len(stops))] for stops in rows], dtype=_INT)
    return ids, below


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device: a copy from ordinary memory would."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def signed_seed(seed: int) -> int:
    """The 64-bit seed as torch stores it."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def _ensure_stop_columns(state: RowState, count: int) -> None:
    missing = count - state.stops.shape[1]
    if missing > 0:
        # In few steps: graphs of steps are captured for one width.
        missing = (1 << (count - 1).bit_length()) - state.stops.shape[1]
        # Tensors of the kind that they replace: to what is compiled, those of inference mode are another one.
        with torch.inference_mode(False):
            state.stops = pad(state.stops, (0, missing), value=-1)
            state.stops_from = pad(state.stops_from, (0, missing))
