"""The model runner: executes step plans on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from .decoding.registry import build_strategies
from .decoding.strategy import Equipment, Strategy
from .decoding.view import Decision, RowView, Span, WindowStatistics
from .drafting import Drafter
from .family import FamilyTraits
from .flags import SamplingFlags, flags_of, is_smoothed
from .flight import Flight
from .forward import Forward, read_vocabulary
from .fusion import Fusion
from .graphs import StepGraphs, most_positions
from .groups import no_statistics, span_of, stand, statistics_of
from .layout import Group, StepLayout, StepShape, lay_out
from .logit_rows import window_index
from .models.decoder import Decoder, KVCache
from .plan import Admission, StepPlan
from .prices import marginal_cost
from .sampling import CHUNK, Sampler, to_segments, to_window
from .segments import draft_rows, segment_rows
from .smoothing import Mixer, make_room
from .stages import prepare, report, settle
from .state import RowState, admit_rows, grant_pages
from .transfer import to_device

# Up to so many rows a GPU takes about as long for a product with the vocabulary as for reading it, which is saved once.
# (An H200 with 152k ids of 3,584 numbers: 0.24 ms; with smaller models logits weigh more, and all of it less.)
_FREE_ROWS = 128


class ModelRunner:
    """Holds the weights, the K/V pages and the row state of one device, and turns plans into reports.

    rows: slots of the state that plans name; those behind them are for idle rows, one of each strategy. graphs: run
    steps as CUDA graphs. row_share: how much longer a forward takes for one more position (see `marginal_cost`).

    Nothing in `launch` waits for the device; the one copy to the host is that of the reports.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        state: RowState,
        traits: FamilyTraits,
        *,
        rows: int,
        reference: bool,
        graphs: bool = False,
        row_share: float = 0.003,
        equipment: Equipment | None = None,
    ) -> None:
        self.decoder, self.cache, self.state, self.traits = decoder, cache, state, traits
        self._most = most_positions(decoder.backbone.parameters)
        self.graphs = StepGraphs(self.step, state.device, self._most) if graphs else None
        self.fusion = Fusion(graphs)
        for stops in (state.stops, state.stops_from):
            self.fusion.resizes(stops, 1)
        self._prepare, self._settle, self._report = self.fusion(prepare), self.fusion(settle), self.fusion(report)
        self._to_window, self._draft_rows = self.fusion(to_window), self.fusion(draft_rows)
        # Whether sizes of small steps are rounded up.
        self.rounding = graphs
        self.row_share = row_share
        self.reference = reference
        self.strategies = build_strategies(reference, equipment)
        self.stop_at_block_end = reference and traits.logit_source == "own"
        banned = (*traits.banned_ids, *(() if traits.mask_id is None else (traits.mask_id,)))
        self.sampler = Sampler(banned, reference, decoder.backend, state.device, decoder.share, self.fusion)
        self.drafter = Drafter(decoder, self.sampler, self.fusion)
        # Positions of a step with draft segments up to which all of them become logits, whichever will be asked. On a
        # CPU every row costs arithmetic.
        self.joint_rows = _FREE_ROWS if decoder.backend == "triton" else 0
        self._flags: dict[int, SamplingFlags] = {}
        self._windows: dict[int, int] = {}
        self._idle: dict[str, int] = {}
        self._spare = list(range(rows, state.start.shape[0]))
        # What preempted rows' strategies remembered, by the key of the sequence.
        self._kept: dict[int, dict[str, Tensor]] = {}

    @contextmanager
    def learning(self, really: bool = True) -> Iterator[None]:
        """Within it, what is met for the first time is compiled (see `Fusion`). really: False changes nothing."""
        if really and self.graphs is not None:
            # A first run compiles, and only the second one may be captured.
            self.graphs.forget_seen()
        with self.fusion.learning(really):
            yield

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Flight | None:
        """Admit, grant, and have the device run one forward, decide and advance; None where the plan has no rows."""
        self._admit(plan)
        if not plan.rows:
            return None
        layout = self._lay_out(plan)
        began = None
        if self.state.device.type == "cuda":
            began = torch.cuda.Event(enable_timing=True)
            began.record()
        self.fusion.idle = layout.shape.tokens > self._most
        packed = self.graphs.run(layout, self._state_version()) if self.graphs is not None else None
        if packed is None:
            # What is captured knows no lengths, and what is compiled for it must be the same.
            lengths = layout.lengths if self.graphs is None else None
            packed = self.step(layout.shape, to_device(layout.array, self.state.device), lengths)
        return Flight(layout, packed, began)

    def step(self, shape: StepShape, array: Tensor, lengths: list[int] | None = None) -> Tensor:
        """One forward and what follows from it, on the device alone. Returns the packed reports of all rows, flat.

        Depends on nothing of the host but `shape`, so that it can be captured. array: see `step_inputs`. lengths:
        positions of each row, which spare a CPU the question.
        """
        state, traits = self.state, self.traits
        # Of one rank, what a plan sums changes how much is run and no text.
        apart = self.decoder.ranks.size > 1 and any(self.strategies[g.strategy].chains for g in shape.groups)
        planned = prepare if apart else self._prepare
        ready = planned(state, shape, array, self.strategies, traits, self.cache.page_size, lengths)
        inputs, span, batch = ready.inputs, ready.span, ready.batch
        hidden = self.decoder.forward(
            batch.ids, batch.positions, batch.slots, self.cache, batch.layout, batch.noisy, batch.added
        )
        width = span.targets.shape[1]
        certain = self._drafts_are_certain(shape)
        joint, lead = shape.tokens <= self.joint_rows, self._lead if certain else None
        forward = read_vocabulary(self.decoder, shape, inputs, hidden, batch.logits, joint=joint, lead=lead)
        if batch.logits is not None:
            seeding = None if traits.commits_blocks else span.seeding
            mixer = Mixer(state, self.decoder.mix, self.decoder.share) if shape.flags.smoothed else None
            found = self.sampler.propose(state, batch.logits, seeding, forward.of_targets, shape.flags, mixer=mixer)
            statistics = self._to_window(batch.logits, found, shape.rows, width)
        else:
            statistics = no_statistics(shape.rows, width, shape.flags, state.device)
        packed = [
            self._advance(group, view, span_of(span, group), statistics_of(statistics, group), forward)
            for group, view in zip(shape.groups, ready.views, strict=True)
        ]
        return torch.cat([table.flatten() for table in packed]) if len(packed) > 1 else packed[0].flatten()

    def _lay_out(self, plan: StepPlan) -> StepLayout:
        slots = [row.slot for row in plan.rows]
        # By identity: most rows' flags are one object, and its hash costs more than all else here.
        different = {id(own): own for own in map(self._flags.__getitem__, slots)}
        # Larger forwards are prefill: there the device is the slower side anyway, and padding would cost.
        small = sum([row.width + row.segments * row.segment for row in plan.rows]) <= self._most
        return lay_out(
            plan.rows,
            [self._windows[slot] for slot in slots],
            reduce(or_, different.values()),
            marginal_cost(len(plan.rows), self.row_share),
            self._idle.__getitem__ if self.rounding and small else None,
        )

    def _state_version(self) -> tuple[object, ...]:
        """Changes when a tensor of the state is replaced, or a new one is there."""
        return self.state.stops.shape, *((name, kept.shape) for name, kept in self.state.memory.items())

    def _advance(
        self,
        group: Group,
        view: RowView,
        span: Span,
        statistics: WindowStatistics,
        forward: Forward,
    ) -> Tensor:
        """Decide and advance one group; returns its packed reports, [rows, 15 + 2 W] int32."""
        strategy = self.strategies[group.strategy]
        if strategy.biased and forward.logits is not None:
            statistics = self._biased(strategy, group, view, span, statistics, forward)
        if self.traits.commit_opens and not strategy.frontier:
            stand(statistics, span.opening)
            head, logits = self.decoder.draft_head, forward.logits
            # The head's proposals know nothing of a bias.
            if head is not None and logits is not None and not strategy.biased:
                flags = forward.shape.flags
                index = window_index(logits, forward.shape.rows, group.window)[group.first : group.last]
                statistics = self.drafter.couple(
                    head, self.state, forward.hidden, logits, flags, view, statistics, span.opening, index
                )
        if strategy.branches and span.segments is not None and group.segments:
            statistics.segments = self._segment_statistics(strategy, group, view, span.segments, forward)
        state, traits = self.state, self.traits
        # A halt looks at the mean of margins.
        decides = settle if strategy.sums or forward.shape.flags.margin else self._settle
        decision, outcome = decides(state, view, span, statistics, traits, strategy, self.stop_at_block_end)
        if decision.accepted is not None and span.segments is not None:
            self._draft(group, view, span.segments, decision, decision.accepted, forward)
        reports = report if strategy.chains and self.decoder.ranks.size > 1 else self._report
        return reports(state, group, view, span, forward.inputs, traits, strategy, outcome)

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
        if not group.segments:
            self.state.drafts[view.slots] = torch.where(whole, 0, view.drafts)
            return
        rows = self._draft_rows(group, forward.inputs, view.slots, segments, view.start, accepted, self._lead)
        last = decision.tokens.gather(1, accepted[:, None])[:, 0]
        flags = forward.shape.flags
        self.drafter.draft(self.state, forward.hidden, rows, flags, view.slots, last, whole, forward.ahead)

    @property
    def _lead(self) -> int:
        """Masks of a draft segment that propose nothing."""
        return 0 if self.traits.logit_source == "previous" else 1

    def _drafts_are_certain(self, shape: StepShape) -> bool:
        """Whether the rows that will draft are known before anything is decided, so that one product with the
        vocabulary does for both. Only where it gives each row the bits that it has alone."""
        group, *others = shape.groups
        # Sizes that are rounded do not say how many segments a row has.
        single = group.segments == 1 and not self.rounding
        certain = single and not others and not self.strategies[group.strategy].branches
        few = shape.logits + shape.rows * group.segment <= CHUNK
        return certain and few and self.decoder.backend == "native" and self.decoder.draft_head is not None

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
        index = window_index(forward.logits, forward.shape.rows, window)[group.first : group.last].flatten()
        asked = forward.logits.at(index)
        places = torch.arange(rows * window, device=index.device)
        # An entry for every position of the window; those that were not asked about say nothing.
        asked.row, asked.offset = places // window, places % window
        asked.slot, asked.valid = view.slots[asked.row], statistics.candidates.flatten()
        bias = strategy.bias(view, statistics, self.traits).flat()
        flags = forward.shape.flags
        found = self.sampler.propose(self.state, asked, span.seeding, forward.to_logits, flags, bias)
        return to_window(asked, found, rows, window)

    def _segment_statistics(
        self, strategy: Strategy, group: Group, view: RowView, segments: Tensor, forward: Forward
    ) -> WindowStatistics:
        """Of all rows of the segments that ran, on a grid of [rows, S, L]."""
        shift = 1 if self.traits.logit_source == "previous" else 0
        segments = segments[:, : group.segments]
        rows = segment_rows(group, forward.inputs, view.slots, segments, view.start, shift, causal=strategy.frontier)
        flags = forward.shape.flags
        found = self.sampler.propose(self.state, rows, None, forward.to_logits, flags)
        return to_segments(rows, found, *segments.shape)

    def _admit(self, plan: StepPlan) -> None:
        for slot, key in plan.keeps:
            self._kept[key] = {name: kept[slot].clone() for name, kept in self.state.memory.items()}
        for key in plan.forgets:
            self._kept.pop(key, None)
        for row in plan.admissions:
            self._remember(row)
        admissions = [*plan.admissions, *self._idle_rows(plan.admissions)]
        edit_ids = self.traits.edit_ids or ()
        admit_rows(self.state, admissions, self.traits.stop_ids, self.traits.mask_id, edit_ids)
        for row in plan.admissions:
            for name, value in self._kept.pop(row.key, {}).items():
                self.state.memory[name][row.slot][tuple(map(slice, value.shape))] = value
        grant_pages(self.state, plan.grants)
        if self.reference and plan.admissions:
            # The authors' code compares probabilities of the model's dtype, which rounds the threshold to it too.
            column = self.state.parameters["threshold"]
            column.copy_(column.to(self.decoder.dtype))
        for row in plan.admissions:
            strategy = self.strategies[row.decoding.strategy]
            self._flags[row.slot] = flags_of(row.sampling, row.decoding, strategy, edit_ids)
            self._windows[row.slot] = strategy.window(row.decoding.values, self.traits)

    def _remember(self, row: Admission) -> None:
        """Make room for what the row's strategy keeps; for all slots, once."""
        strategy, state = self.strategies[row.decoding.strategy], self.state
        for name, memory in strategy.memory(row.decoding.values, self.traits).items():
            if name not in state.memory:
                shape = (state.start.shape[0], *memory.shape)
                state.memory[name] = torch.zeros(shape, dtype=memory.dtype, device=state.device)
        if is_smoothed(row.decoding):
            make_room(state, strategy.window(row.decoding.values, self.traits), self.decoder.embedding)

    def _idle_rows(self, admissions: list[Admission]) -> list[Admission]:
        """A row for each strategy that comes for the first time, with nothing to do: steps are filled up with it."""
        made = []
        for row in admissions if self.rounding else ():
            if row.decoding.strategy not in self._idle:
                self._idle[row.decoding.strategy] = slot = self._spare.pop()
                start = row.geometry.start(1)
                idle = replace(row, slot=slot, tokens=row.tokens[:1], prompt_len=1, limit=2, suffix=[], key=-1)
                made.append(replace(idle, final_len=0, start=start, step=0, window=[], decided=[], choice=0))
        return made
