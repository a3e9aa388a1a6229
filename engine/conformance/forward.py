"""Forward cases: logits of the paged engine against the reference's, alone and beside a stranger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linocut.kernels.attention import AttentionLayout

from ..core import EngineCore
from .fixture import Fixture, Result

ATOL, RTOL = 2e-4, 1e-5


class Probe:
    """Runs given ids at given positions of one sequence on scattered pages, next to a stranger's rows."""

    def __init__(self, core: EngineCore, pages: int, stranger: bool) -> None:
        self._core, self._pool = core, core.scheduler.pool
        taken = self._pool.allocate(2 * pages)
        # Pages far apart and in descending order: nothing may rely on neighbours.
        self._tables = [taken[0::2][::-1], taken[1::2]] if stranger else [taken[0::2][::-1]]
        self._taken = taken
        self._ids = torch.Generator().manual_seed(7)

    def run(
        self, ids: list[int], start: int, length: int, block_size: int, positions: list[int] | None = None
    ) -> Tensor:
        """Logits [len(ids), vocab] of `ids` in slots start ..; the sequence is `length` positions long by then.

        positions: their RoPE positions, where these are not their slots.
        """
        runner, page = self._core.runner, self._core.info.page_size
        rows = [(ids, start, length)]
        if len(self._tables) > 1:
            other = torch.randint(0, self._core.info.vocab_size, (len(ids) + 3,), generator=self._ids).tolist()
            rows.insert(0, (other, 0, len(other)))
        tables = self._tables[::-1]
        flat, places, slots, visible, widths = [], [], [], [], []
        own = positions or list(range(start, start + len(ids)))
        for (row_ids, first, end), table in zip(rows, tables, strict=True):
            for place, token in enumerate(row_ids, start=first):
                flat.append(token)
                places.append(own[place - first] if row_ids is ids else place)
                slots.append(table[place // page] * page + place % page)
                visible.append(self._visible(place, end, block_size))
            widths.append(len(row_ids))
        starts = [0, *torch.tensor(widths).cumsum(0).tolist()]

        def ints(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=runner.state.device)

        layout = AttentionLayout(
            query_start=ints(starts),
            page_table=ints(tables),
            visible=ints(visible),
            scratch_start=None,
            scratch_end=None,
            max_query=max(widths),
            max_visible=max(visible),
            query_lengths=widths,
            page_size=page,
        )
        with torch.inference_mode():
            hidden = runner.decoder.forward(ints(flat), ints(places), ints(slots), runner.cache, layout)
            return runner.decoder.all_logits(hidden[starts[-2] :]).cpu()

    def _visible(self, place: int, end: int, block_size: int) -> int:
        if self._core.traits.context == "token-causal":
            return place + 1
        if self._core.traits.context == "full":
            return end
        return min((place // block_size + 1) * block_size, end)

    def close(self) -> None:
        self._pool.release(self._taken)


def run_forward_cases(fixture: Fixture) -> list[Result]:
    results = []
    for case in fixture.cases("forward_cases"):
        core = fixture.engine(case.get("block_size") if fixture.family.startswith("sdar") else None, (), "reference")
        block = case.get("block_size", core.traits.block_size)
        problems = []
        for stranger in (False, True):
            want = fixture.tensors[case["logits"]]
            got = _logits(core, case, block, stranger)
            beside = "beside a stranger" if stranger else "alone"
            if got.shape != want.shape:
                problems.append(f"{beside}: {list(got.shape)} logits, the reference has {list(want.shape)}")
                continue
            error = (got - want).abs()
            if not bool((error <= ATOL + RTOL * want.abs()).all()):
                problems.append(f"{beside}: largest error {float(error.max()):.2e}")
        results.append(Result(case["name"], "fail" if problems else "pass", "; ".join(problems)))
    return results


def _logits(core: EngineCore, case: dict[str, Any], block: int, stranger: bool) -> Tensor:
    if core.traits.context == "full":
        return _canvas_logits(core, case, stranger)
    kind = case["kind"]
    prefix = list(case.get("input_ids", case.get("prefix_ids", [])))
    ids = list(case.get("block_ids", case.get("fed_ids", [])))
    probe = Probe(core, -(-(len(prefix) + len(ids) + 8) // core.info.page_size) + 2, stranger)
    try:
        if kind == "prefill":
            return probe.run(prefix, 0, len(prefix), block)
        if prefix:
            probe.run(prefix, 0, len(prefix), block)
        length = len(prefix) + len(ids)
        logits = probe.run(ids, len(prefix), length, block, case.get("fed_pos"))
        if kind == "sub_block_with_block_kv":
            logits = probe.run(list(case["sub_ids"]), len(prefix) + case["sub_start"], length, block)
        elif kind not in ("noisy_block", "window"):
            raise ValueError(f"unknown kind of forward case: {kind}")
        return logits
    finally:
        probe.close()


def _canvas_logits(core: EngineCore, case: dict[str, Any], stranger: bool) -> Tensor:
    """Full attention: all positions at once, or some of them on K/V that an earlier forward left of the others."""
    kind, first = case["kind"], list(case.get("first_ids", case.get("input_ids", [])))
    length = len(first)
    probe = Probe(core, -(-(length + 8) // core.info.page_size) + 2, stranger)
    try:
        logits = probe.run(first, 0, length, length)
        if kind in ("full", "canvas"):
            return logits
        start, end = case["block"]
        if kind not in ("prefix_cache", "dual_cache"):
            raise ValueError(f"unknown kind of forward case: {kind}")
        end = length if kind == "prefix_cache" else end
        return probe.run(list(case["then_ids"][start:end]), start, length, length)
    finally:
        probe.close()
