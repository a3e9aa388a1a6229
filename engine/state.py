"""Row state on the device: slot-indexed tensors from which every forward is derived.

The host writes a row at admission and grants it pages; from then on tensor functions advance it, so that a later step
can be enqueued before the host has seen the outcome of this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .decoding.columns import Parameters
from .decoding.registry import columns, strategy_classes
from .decoding.strategies.verify import MAX_DRAFT
from .params import SamplingParams
from .plan import Admission, PageGrant
from .transfer import to_device

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
    slots = to_device(np.array([row.slot for row in admissions]), state.device)

    def write(column: Tensor, values: np.ndarray) -> None:
        column.index_copy_(0, slots, to_device(values, state.device))

    tokens, decided = _initial_tokens(admissions, mask_id)
    length = tokens.shape[1]
    write(state.tokens[:, :length], tokens)
    write(state.decided[:, :length], decided)
    state.tokens[:, length:].index_fill_(0, slots, mask_id or 0)
    state.decided[:, length:].index_fill_(0, slots, False)
    stops = [_stops_of(row, stop_ids, edit_ids) for row in admissions]
    _ensure_stop_columns(state, max(map(len, stops)))
    width = state.stops.shape[1]
    write(state.stops, np.array([[*ids, *[-1] * (width - len(ids))] for ids in stops], np.int32))
    write(state.stops_from, np.array([[*ids.values(), *[0] * (width - len(ids))] for ids in stops], np.int32))
    sampling, geometries = [row.sampling for row in admissions], [row.geometry for row in admissions]
    integers = {
        "prompt_len": [row.prompt_len for row in admissions],
        "start": [row.start for row in admissions],
        "final_len": [row.final_len for row in admissions],
        "step": [row.step for row in admissions],
        "limit": [row.limit for row in admissions],
        "block": [geometry.block for geometry in geometries],
        "window": [geometry.window for geometry in geometries],
        "origin": [geometry.origin for geometry in geometries],
        "canvas": [geometry.canvas for geometry in geometries],
        "top_k": [min(s.top_k, torch.iinfo(_INT).max) for s in sampling],
        "choice": [row.choice for row in admissions],
    }
    floats = {
        "temperature": [0.0 if is_greedy(s) else s.temperature for s in sampling],
        "top_p": [s.top_p for s in sampling],
        "min_p": [s.min_p for s in sampling],
    }
    # One copy for all columns of a kind.
    for named, dtype in ((integers, np.int32), (floats, np.float32)):
        table = to_device(np.array([*named.values()], dtype), state.device)
        for name, values in zip(named, table, strict=True):
            getattr(state, name).index_copy_(0, slots, values)
    write(state.seed, np.array([signed_seed(s.seed) for s in sampling]))
    for column in (state.fresh, state.finished, state.drafts, state.row_cost):
        column.index_fill_(0, slots, 0)
    parameters = state.parameters
    of_rows = parameters.columns.encode([row.decoding.values for row in admissions])
    for column, encoded in zip((parameters.numbers, parameters.integers), of_rows, strict=True):
        write(column, encoded.numpy())
    for kept in state.memory.values():
        kept.index_fill_(0, slots, 0)


def is_greedy(sampling: SamplingParams) -> bool:
    """Temperatures below this leave nothing to chance, and their reciprocal would leave float32."""
    return sampling.temperature < 1e-5


def grant_pages(state: RowState, grants: list[PageGrant]) -> None:
    """Append pages to rows' tables."""
    if not grants:
        return
    slots = [g.slot for g in grants for _ in g.pages]
    places = [place for g in grants for place in range(g.first, g.first + len(g.pages))]
    pages = [page for g in grants for page in g.pages]
    table = to_device(np.array([slots, places, pages]), state.device)
    state.page_table.index_put_((table[0], table[1]), table[2].to(_INT))


def _initial_tokens(admissions: list[Admission], mask_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """[rows, positions] ids and flags of new rows, as far as any of them has something to say."""
    length = max(
        max(len(row.tokens) + FIRST_DRAFT, row.start + len(row.decided), row.limit + len(row.suffix))
        for row in admissions
    )
    tokens = np.full((len(admissions), length), mask_id or 0, np.int32)
    decided = np.zeros(tokens.shape, np.bool_)
    for index, row in enumerate(admissions):
        known = len(row.tokens)
        tokens[index, :known] = np.fromiter(row.tokens, np.int32, known)
        if mask_id is None or row.geometry.refeeds:
            tokens[index, known : known + FIRST_DRAFT] = np.resize(tokens[index, :known], FIRST_DRAFT)
        else:
            behind = row.window[max(known - row.start, 0) :]
            tokens[index, known : known + len(behind)] = behind
        decided[index, :known] = True
        decided[index, row.start : row.start + len(row.decided)] = row.decided
        tokens[index, row.limit : row.limit + len(row.suffix)] = row.suffix
        decided[index, row.limit : row.limit + len(row.suffix)] = True
    return tokens, decided


def _stops_of(row: Admission, stop_ids: tuple[int, ...], edit_ids: tuple[int, ...]) -> dict[int, int]:
    """Stop ids of a row, with the position below which each is banned."""
    minimum = row.prompt_len + row.sampling.min_tokens
    # Behind max_tokens too: what stands there has its say in the block.
    stops = {stop: torch.iinfo(_INT).max if row.sampling.ignore_eos else minimum for stop in stop_ids}
    stops |= {stop: minimum for stop in row.sampling.stop_token_ids}
    if not strategy_classes()[row.decoding.strategy].edits:
        stops |= dict.fromkeys(edit_ids, torch.iinfo(_INT).max)
    return stops


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
