"""The model runner: executes step plans on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import ForwardBatch, build_batch, cap_span, concat_spans
from .decoding.advance import advance, guard, row_view
from .decoding.registry import build_strategies
from .decoding.strategy import Equipment, Needs, Strategy
from .decoding.view import Decision, RowView, Span, WindowStatistics
from .drafting import Drafter
from .family import FamilyTraits
from .graphs import ForwardGraphs
from .groups import Group, no_statistics, span_of, statistics_of, unpack_reports
from .logit_rows import LogitRows, window_index
from .models.decoder import Decoder, KVCache
from .params import DecodingParams, SamplingParams
from .plan import Admission, RowPlan, RowReport, StepPlan
from .sampling import Sampler, SamplingFlags, to_window
from .segments import draft_rows, segment_rows
from .state import RowState, admit_rows, grant_pages, is_greedy


@dataclass
class Forward:
    """What a step's forward leaves for its groups. hidden: [tokens, hidden]; query_start: [rows + 1]."""

    rows: list[RowPlan]
    hidden: Tensor
    query_start: Tensor
    logits: LogitRows | None
    flags: SamplingFlags
    row_cost: float


class ModelRunner:
    """Holds the weights, the K/V pages and the row state of one device, and turns plans into reports.

    row_share: how much longer a forward takes for one more position (see `marginal_cost`).

    Within `execute` nothing waits for the device; the one copy to the host is the report at its end.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        state: RowState,
        traits: FamilyTraits,
        *,
        reference: bool,
        graphs: bool = False,
        row_share: float = 0.003,
        equipment: Equipment | None = None,
    ) -> None:
        self.decoder, self.cache, self.state, self.traits = decoder, cache, state, traits
        self.graphs = ForwardGraphs(decoder, cache) if graphs else None
        self.row_share = row_share
        self.reference = reference
        self.strategies = build_strategies(reference, equipment)
        self.stop_at_block_end = reference and traits.logit_source == "own"
        banned = (*traits.banned_ids, *(() if traits.mask_id is None else (traits.mask_id,)))
        self.sampler = Sampler(banned, reference, decoder.backend, state.device)
        self.drafter = Drafter(decoder, self.sampler)
        self._flags: dict[int, SamplingFlags] = {}
        self._windows: dict[int, int] = {}
        # What preempted rows' strategies remembered, by the key of the sequence.
        self._kept: dict[int, dict[str, Tensor]] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[RowReport]:
        """Admit, grant, run one forward, decide, advance. Reports come in the order of `plan.rows`."""
        self._admit(plan)
        if not plan.rows:
            return []
        state, traits = self.state, self.traits
        slots = self._ints([row.slot for row in plan.rows]).long()
        groups = self._groups(plan.rows)
        views = [row_view(state, slots[g.first : g.last], g.window) for g in groups]
        spans = [self.strategies[g.strategy].plan(v, traits) for g, v in zip(groups, views, strict=True)]
        span, whole = cap_span(concat_spans(spans), self._ints([row.width for row in plan.rows]))
        start = torch.cat([view.start for view in views]) if len(views) > 1 else views[0].start

        batch = build_batch(state, plan.rows, slots, span, start, traits, self.cache.page_size)
        hidden = self._forward(batch)
        width = span.targets.shape[1]
        flags = SamplingFlags()
        for some in {self._flags[row.slot] for row in plan.rows}:
            flags |= some
        if batch.logits is not None:
            found = self.sampler.propose(state, hidden, batch.logits, span.seeding, self.decoder.logits, flags)
            statistics = to_window(batch.logits, found, len(plan.rows), width)
        else:
            statistics = no_statistics(len(plan.rows), width, state.device)
        row_cost = marginal_cost(len(plan.rows), self.row_share)
        forward = Forward(plan.rows, hidden, batch.layout.query_start, batch.logits, flags, row_cost)

        packed = []
        for group, view in zip(groups, views, strict=True):
            view.whole = whole[group.first : group.last]
            packed.append(self._advance(group, view, span_of(span, group), statistics_of(statistics, group), forward))
        return [
            report
            for group, table in zip(groups, packed, strict=True)
            for report in unpack_reports(table, group.window)
        ]

    def _forward(self, batch: ForwardBatch) -> Tensor:
        hidden = self.graphs.forward(batch) if self.graphs is not None else None
        if hidden is None:
            hidden = self.decoder.forward(
                batch.ids, batch.positions, batch.slots, self.cache, batch.layout, batch.noisy
            )
        return hidden

    def _advance(
        self,
        group: Group,
        view: RowView,
        span: Span,
        statistics: WindowStatistics,
        forward: Forward,
    ) -> Tensor:
        """Decide and advance one group; returns its packed report, [rows, 13 + 2 W] int32."""
        strategy = self.strategies[group.strategy]
        if self.traits.commit_opens and not strategy.frontier:
            # Clean rows are the autoregressive model: what they say stands.
            statistics.confidence.masked_fill_(statistics.candidates & span.opening, torch.inf)
            head, logits = self.decoder.draft_head, forward.logits
            if head is not None and logits is not None:
                index = window_index(logits, len(forward.rows), group.window)[group.first : group.last]
                statistics = self.drafter.couple(
                    head, self.state, forward.hidden, logits, forward.flags, view, statistics, span.opening, index
                )
        if strategy.biased and forward.logits is not None:
            statistics = self._biased(strategy, group, view, span, statistics, forward)
        if span.segment_tokens is not None and span.segments is not None:
            statistics.segments = self._segment_statistics(group, view, span.segments, forward)
        decision: Decision = guard(view, statistics, strategy.decide(view, statistics, self.traits))
        outcome = advance(self.state, view, span, decision, self.traits, strategy, self.stop_at_block_end)
        if decision.accepted is not None and span.segments is not None:
            self._draft(group, view, span.segments, decision, decision.accepted, forward)
        # The load changes from step to step; a plan that the host has been told of must not.
        asked = view.parameters["row_cost"]
        self.state.row_cost[view.slots] = torch.where(asked < 0, forward.row_cost, asked)
        after = row_view(self.state, view.slots, group.window)
        coming = strategy.plan(after, self.traits)
        columns = [
            after.start,
            after.final_len,
            after.step,
            coming.run_start,
            coming.run_end - coming.run_start,
            coming.targets.sum(dim=1),
            torch.zeros_like(after.start) if coming.segments is None else (coming.segments >= 0).sum(dim=1),
        ]
        return torch.cat([torch.stack([c.int() for c in columns], dim=1), outcome], dim=1)

    def _draft(
        self,
        group: Group,
        view: RowView,
        segments: Tensor,
        decision: Decision,
        accepted: Tensor,
        forward: Forward,
    ) -> None:
        whole = view.whole
        plan = forward.rows[group.first : group.last]
        if not any(row.segments for row in plan):
            self.state.drafts[view.slots] = torch.where(whole, 0, view.drafts)
            return
        lead = 0 if self.traits.logit_source == "previous" else 1
        first = forward.query_start[group.first : group.last]
        rows = draft_rows(plan, view.slots, segments, view.start, first, accepted, lead)
        last = decision.tokens.gather(1, accepted[:, None])[:, 0]
        self.drafter.draft(self.state, forward.hidden, rows, forward.flags, view.slots, last, whole)

    def _biased(
        self,
        strategy: Strategy,
        group: Group,
        view: RowView,
        span: Span,
        statistics: WindowStatistics,
        forward: Forward,
    ) -> WindowStatistics:
        """Statistics of the group once more, from logits that the strategy has changed."""
        assert forward.logits is not None
        rows, window = group.last - group.first, group.window
        index = window_index(forward.logits, len(forward.rows), window)[group.first : group.last].flatten()
        asked = forward.logits.at(index)
        places = torch.arange(rows * window, device=index.device)
        # An entry for every position of the window; those that were not asked about say nothing.
        asked.row, asked.offset = places // window, places % window
        asked.slot, asked.valid = view.slots[asked.row], statistics.candidates.flatten()
        bias = strategy.bias(view, statistics).flat()
        found = self.sampler.propose(
            self.state, forward.hidden, asked, span.seeding, self.decoder.logits, forward.flags, bias
        )
        return to_window(asked, found, rows, window)

    def _segment_statistics(
        self, group: Group, view: RowView, segments: Tensor, forward: Forward
    ) -> WindowStatistics | None:
        """Of all rows of the segments that ran, on a grid of [rows, S * L]; None where none ran."""
        plan = forward.rows[group.first : group.last]
        if not any(row.segments for row in plan):
            return None
        first = forward.query_start[group.first : group.last]
        shift = 1 if self.traits.logit_source == "previous" else 0
        rows = segment_rows(plan, view.slots, segments, view.start, first, shift)
        found = self.sampler.propose(self.state, forward.hidden, rows, None, self.decoder.logits, forward.flags)
        return to_window(rows, found, len(plan), rows.source.shape[0] // len(plan))

    def _admit(self, plan: StepPlan) -> None:
        for slot, key in plan.keeps:
            self._kept[key] = {name: kept[slot].clone() for name, kept in self.state.memory.items()}
        for key in plan.forgets:
            self._kept.pop(key, None)
        for row in plan.admissions:
            self._remember(row)
        admit_rows(self.state, plan.admissions, self.traits.stop_ids, self.traits.mask_id)
        for row in plan.admissions:
            for name, value in self._kept.pop(row.key, {}).items():
                self.state.memory[name][row.slot] = value
        grant_pages(self.state, plan.grants)
        if self.reference and plan.admissions:
            # The authors' code compares probabilities of the model's dtype, which rounds the threshold to it too.
            column = self.state.parameters["threshold"]
            column.copy_(column.to(self.decoder.dtype))
        for row in plan.admissions:
            strategy = self.strategies[row.decoding.strategy]
            self._flags[row.slot] = _flags(row.sampling, row.decoding, strategy)
            self._windows[row.slot] = strategy.window(row.decoding.values, self.traits)

    def _remember(self, row: Admission) -> None:
        """Make room for what the row's strategy keeps; for all slots, once."""
        strategy, state = self.strategies[row.decoding.strategy], self.state
        for name, memory in strategy.memory(row.decoding.values, self.traits).items():
            if name not in state.memory:
                shape = (state.start.shape[0], *memory.shape)
                state.memory[name] = torch.zeros(shape, dtype=memory.dtype, device=state.device)

    def _groups(self, rows: list[RowPlan]) -> list[Group]:
        groups: list[Group] = []
        for index, row in enumerate(rows):
            window = self._windows[row.slot]
            if groups and groups[-1].strategy == row.strategy:
                groups[-1].last = index + 1
                groups[-1].window = max(groups[-1].window, window)
            else:
                groups.append(Group(row.strategy, index, index + 1, window))
        return groups

    def _ints(self, values: list[int]) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.int32)
        device = self.state.device
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _flags(sampling: SamplingParams, decoding: DecodingParams, strategy: Strategy) -> SamplingFlags:
    needs = strategy.needs(decoding.values)
    filtered = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
    return SamplingFlags(
        sampled=not is_greedy(sampling),
        filtered=filtered,
        stops_banned=sampling.ignore_eos or sampling.min_tokens > 0,
        filtered_confidence=filtered and decoding.values.get("confidence") == "filtered",
        entropy=bool(needs & Needs.ENTROPY),
        margin=bool(needs & Needs.MARGIN),
    )


def marginal_cost(rows: int, share: float) -> float:
    """Tokens that one more position of a forward must promise to pay for itself.

    A forward of R positions takes about 1 + share * R times that of none. With `rows` sequences of some eight positions
    and two tokens each, one more position costs share / (1 + 8 * share * rows) of the forward, so that share of
    2 * rows tokens.
    """
    return 2 * rows * share / (1 + 8 * share * rows)
