"""The engine core: requests in, steps, outputs. One process, one device, no I/O."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import replace

import msgspec

from .decoding.registry import offered, strategy_classes
from .decoding.strategy import Equipment
from .family import FamilyTraits
from .flight import Flight
from .geometry import Geometry
from .loading import LoadedModel
from .machine import is_out_of_memory, release_memory
from .messages import Abort, AddRequest, ChoiceOutput, EngineStats, FinishReason
from .plan import StepPlan
from .pressure import LEAST_POSITIONS, MemoryPressure
from .sequence import Sequence
from .step_clock import StepClock
from .validation import check_request

log = logging.getLogger("linocut.engine")


class EngineCore:
    """Schedules and executes steps for one loaded model."""

    def __init__(self, model: LoadedModel, *, check_invariants: bool = False) -> None:
        self.info, self.traits = model.info, model.traits
        self.runner, self.scheduler = model.runner, model.scheduler
        self._check = check_invariants
        self._sequences: dict[str, list[Sequence]] = {}
        self._order = 0
        self.clock = StepClock()
        self._pressure = MemoryPressure(model.scheduler.token_budget, LEAST_POSITIONS)
        # Whether the next forward is planned and launched before the results of this one are there. A CPU has nothing
        # else to do while it computes.
        self.overlapping = model.runner.state.device.type == "cuda"
        self._flights: deque[Flight] = deque()  # two at most
        self._landed: tuple[Flight, float] | None = None  # not tallied yet, and the seconds of the clock then
        self._tallied: Flight | None = None
        self._moved: list[tuple[Sequence, list[int]]] = []
        self._shed: list[Sequence] = []  # ended because a forward of it alone does not fit the memory

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or bool(self._flights or self._shed)

    def add(self, request: AddRequest) -> None:
        """Queue a request's choices. Raises ParameterError if it cannot be served; then nothing was queued."""
        self.validate(request)
        geometry = geometry_of(request, self.traits)
        leader: Sequence | None = None
        now = time.monotonic()
        choices = []
        for choice in range(request.n):
            sequence = Sequence(request, choice, self._order, geometry, leader, arrived=now)
            leader = leader or sequence
            self._order += 1
            choices.append(sequence)
            self.scheduler.add(sequence)
        self._sequences[request.request_id] = choices

    def equip(self, equipment: Equipment) -> None:
        """Give the strategies other equipment than the model folder's."""
        if equipment.filter is not None:
            equipment = Equipment(equipment.filter.to(self.runner.state.device))
        self.traits = replace(self.traits, has_filter=equipment.filter is not None)
        table = offered(self.traits).strategy_table
        self.info = msgspec.structs.replace(self.info, strategy_table=table)
        for strategy in self.runner.strategies.values():
            strategy.equipment = equipment

    def validate(self, request: AddRequest) -> None:
        """Raise ParameterError for what would harm the engine or cannot fit it."""
        check_request(self.info, request, request.request_id in self._sequences)

    def abort(self, message: Abort) -> None:
        """End choices silently; unknown ones are ignored."""
        for sequence in list(self._sequences.get(message.request_id, ())):
            if message.choice is None or sequence.choice == message.choice:
                self.scheduler.abort(sequence)
                self.forget(sequence)
        if not self.busy:
            self.clock.pause()

    def step(self) -> list[ChoiceOutput]:
        """Take in one forward's results; returns what it committed, one entry per choice that moved or ended.

        Where forwards overlap with the host's work, the next one is under way when this returns.
        """
        self.clock.begin()
        if not self._flights:
            self._launch(self.scheduler.schedule())
        if self.overlapping and self._flights:
            ahead = self.scheduler.schedule_ahead()
            if ahead is not None:
                self._launch(ahead)
        self._land()
        if self.overlapping and not self._flights and self.scheduler.busy:
            self._launch(self.scheduler.schedule())
        self._tally()
        shed = {id(sequence) for sequence in self._shed}
        outputs = [output_of(s, tokens, None if id(s) in shed else s.finish) for s, tokens in self._moved]
        outputs += [output_of(sequence, [], "error", "out of memory") for sequence in self._shed]
        self._shed, self._moved = [], []
        self.clock.end(self.busy)
        return outputs

    def _land(self) -> None:
        """Wait for the older forward that is under way, and note the sequences that moved or ended."""
        if not self._flights:
            return
        flight = self._flights.popleft()
        reports = flight.land()
        self._landed = flight, time.perf_counter()
        if self._pressure.succeed():
            self._bound_forwards()
        now = time.monotonic()
        for sequence, tokens in self.scheduler.update(reports, now):
            if tokens or sequence.finish:
                sequence.answered = sequence.answered or now
                self._moved.append((sequence, tokens))
            if sequence.finish:
                self.forget(sequence)
        if self._check:
            self.scheduler.check()

    def _tally(self) -> None:
        """Into the metrics with what has landed. After the launch of what follows, which may wait for the host."""
        if self._landed is not None:
            flight, landed = self._landed
            self.clock.land(landed, flight.times(self._tallied))
            self._landed, self._tallied = None, flight
        self.scheduler.count()

    def _note_started(self) -> None:
        now = time.monotonic()
        for sequence in self.scheduler.running:
            sequence.started = sequence.started or now

    def _launch(self, plan: StepPlan) -> None:
        """Hand a forward to the device.

        If it does not fit the memory, who ran waits again, and forwards are smaller from then on; what does not fit
        alone is shed.
        """
        if plan.admissions:
            self._note_started()
        self.clock.launch()
        try:
            flight = self.launch(plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("a forward of %d rows ran out of memory: %s", len(plan.rows), str(error)[:300])
        else:
            if flight is not None:
                self._flights.append(flight)
            return
        # Outside of the handler, whose traceback holds the tensors of the forward.
        self._land()
        release_memory(self.runner.state.device)
        fits = self._pressure.fail(sum(row.positions for row in plan.rows))
        self._bound_forwards()
        planned = self.scheduler.retreat()
        if planned and not fits:
            self.scheduler.fail(planned[-1])
            self.forget(planned[-1])
            self._shed.append(planned[-1])

    def _bound_forwards(self) -> None:
        log.warning("forwards now hold at most %d positions", self._pressure.budget)
        self.scheduler.token_budget = self._pressure.budget

    def launch(self, plan: StepPlan) -> Flight | None:
        return self.runner.launch(plan)

    def stats(self) -> EngineStats:
        scheduler, counters, clock = self.scheduler, self.scheduler.counters, self.clock
        graphs = self.runner.graphs
        oldest = next((s.arrived for s in scheduler.waiting if s.started is None), None)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            oldest_waiting_seconds=0.0 if oldest is None else time.monotonic() - oldest,
            pages_total=scheduler.pool.total,
            pages_free=scheduler.pool.free,
            pages_cached=scheduler.prefix.idle_pages,
            prefix_query_tokens=scheduler.prefix.query_tokens,
            prefix_hit_tokens=scheduler.prefix.hit_tokens,
            preemptions=counters.preemptions,
            forwards_by_kind=dict(counters.forwards),
            graph_forwards=graphs.replays if graphs else 0,
            graph_captures=graphs.captures if graphs else 0,
            prefill_positions=counters.prefill_positions,
            commit_positions=counters.commit_positions,
            denoise_positions=counters.denoise_positions,
            padding_positions=counters.padding_positions + (graphs.padding if graphs else 0),
            committed_tokens=counters.committed_tokens,
            commits_by_reason=dict(counters.commits),
            edited_tokens=counters.edited_tokens,
            remasked_tokens=counters.remasked_tokens,
            discarded_by_ending=dict(counters.discarded),
            drafted_tokens=counters.drafted_tokens,
            accepted_tokens=counters.accepted_tokens,
            cached_rows=counters.cached_rows,
            refreshed_rows=counters.refreshed_rows,
            blocks_finished=counters.blocks_finished,
            step_seconds=clock.step_seconds,
            out_of_memory=self._pressure.failures,
            forward_seconds=clock.forward_seconds.snapshot(),
            host_gap_seconds=clock.host_gap_seconds.snapshot(),
            forward_positions=counters.forward_positions.snapshot(),
            forward_rows=counters.forward_rows.snapshot(),
            steps_per_block=counters.steps_per_block.snapshot(),
            block_seconds=counters.block_seconds.snapshot(),
        )

    def close(self) -> None:
        """Nothing outlives the process."""

    def forget(self, sequence: Sequence) -> None:
        choices = self._sequences.get(sequence.request.request_id, [])
        if sequence in choices:
            choices.remove(sequence)
        if not choices:
            self._sequences.pop(sequence.request.request_id, None)


def geometry_of(request: AddRequest, traits: FamilyTraits) -> Geometry:
    """How the steps of a request's sequences are laid out."""
    values = request.decoding.values
    strategy = strategy_classes()[request.decoding.strategy]()
    window = strategy.window(values, traits)
    if strategy.frontier:
        return Geometry(
            feed=strategy.first_feed(values, traits),
            refeeds=strategy.refeeds,
            segment=strategy.segment(values, traits),
            shortest=strategy.shortest(values, traits),
            window=window,
            asks=window,
        )
    canvas = 0
    if traits.context == "full":
        canvas = len(request.prompt) + request.sampling.max_tokens + len(request.suffix)
    return Geometry(
        block=strategy.block(values, traits),
        origin=len(request.prompt) if traits.grid == "prompt" and not values.get("aligned") else 0,
        seeds=traits.commit_seeds,
        opens=traits.commit_opens,
        segment=strategy.segment(values, traits),
        shortest=strategy.shortest(values, traits),
        segments=strategy.segments(values),
        canvas=canvas,
        asks_all=strategy.asks_all,
        window=window,
        asks=window,
    )


def output_of(
    sequence: Sequence, tokens: list[int], finish: FinishReason | None, error: str | None = None
) -> ChoiceOutput:
    started = sequence.arrived if sequence.started is None else sequence.started
    return ChoiceOutput(
        request_id=sequence.request.request_id,
        choice=sequence.choice,
        token_ids=tokens,
        finish_reason=finish,
        stop_token=sequence.stop_token,
        error=error,
        forwards=sequence.forwards,
        positions=sequence.positions,
        cached_tokens=sequence.cached_tokens,
        queue_seconds=started - sequence.arrived,
        prefill_seconds=(sequence.answered or started) - started,
    )
