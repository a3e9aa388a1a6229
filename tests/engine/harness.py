"""Drives a scheduler step by step over a fake device and holds every step to the invariants."""

from __future__ import annotations

from fake_device import FakeDevice, Geometry

from linocut.engine.cache.pages import PagePool
from linocut.engine.cache.prefix import PrefixCache
from linocut.engine.geometry import Geometry as Layout
from linocut.engine.messages import AddRequest
from linocut.engine.params import DecodingParams, ParameterValue, SamplingParams
from linocut.engine.plan import RowReport, StepPlan
from linocut.engine.scheduler import Scheduler
from linocut.engine.sequence import Sequence, Status


class Harness:
    """pages: how many the pool hands out. Sequences are kept in order of arrival, the ended ones too."""

    def __init__(
        self,
        geometry: Geometry,
        *,
        pages: int = 64,
        page_size: int = 4,
        max_running: int = 8,
        budget: int = 64,
        caching: bool = True,
        seed: int = 0,
        stop_rate: float = 0.0,
        ahead: bool = False,
        row_share: float = 0.003,
    ) -> None:
        self.geometry = geometry
        self.pool = PagePool(pages + 1)
        self.prefix = PrefixCache(self.pool, page_size, geometry.block, "test", caching)
        self.scheduler = Scheduler(
            self.pool,
            self.prefix,
            page_size=page_size,
            max_running=max_running,
            token_budget=budget,
            row_share=row_share,
        )
        self.device = FakeDevice(geometry, self.pool, page_size, seed, stop_rate, ahead)
        self.ahead = ahead
        self.under_way: list[list[RowReport]] = []
        self.max_running = max_running
        self.sequences: list[Sequence] = []
        self.steps = 0
        self.ended: list[Sequence] = []
        self.aborted: list[Sequence] = []
        self.streamed: dict[Sequence, list[int]] = {}
        self.left_out: dict[Sequence, int] = {}  # steps since a running sequence last ran

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        n: int = 1,
        salt: str = "",
        strategy: str = "s",
        **values: ParameterValue,
    ) -> list[Sequence]:
        """Queue `n` choices, as EngineCore.add does."""
        request = AddRequest(
            request_id=str(len(self.sequences)),
            prompt=prompt,
            sampling=SamplingParams(max_tokens=max_tokens),
            decoding=DecodingParams(strategy=strategy, values=values),
            n=n,
            salt=salt,
        )
        geometry = self.geometry
        feed = int(values.get("draft_length", 1)) if geometry.causal else 0
        choices: list[Sequence] = []
        for choice in range(n):
            leader = choices[0] if choices else None
            order = len(self.sequences)
            window = feed or geometry.block
            laid_out = Layout(
                geometry.block,
                seeds=geometry.shifted and not feed,
                feed=feed,
                refeeds=bool(feed),
                window=window,
                asks=window,
            )
            sequence = Sequence(request, choice, order, laid_out, leader)
            choices.append(sequence)
            self.sequences.append(sequence)
            self.streamed[sequence] = []
            self.scheduler.add(sequence)
        self.scheduler.check()
        return choices

    def abort(self, sequence: Sequence) -> None:
        """As EngineCore.abort does: only what has not ended is still known."""
        if sequence in self.ended or sequence in self.aborted:
            return
        pages, shared = list(sequence.pages), [unit for unit in sequence.units if unit]
        free = self.pool.free + self.prefix.idle_pages
        self.scheduler.abort(sequence)
        self.scheduler.check()
        self.aborted.append(sequence)
        still_shared = sum(len(unit.pages) for unit in shared if unit.users)
        assert self.pool.free + self.prefix.idle_pages == free + len(pages) - still_shared, "pages are free at once"

    def step(self) -> StepPlan | None:
        """One step, as EngineCore has it; every invariant that can be seen from outside is checked. The last plan."""
        scheduler = self.scheduler
        tokens = {s: list(s.tokens) for s in self.sequences}
        plan = None if self.under_way else self._launch(ahead=False)
        if self.ahead and self.under_way:
            plan = self._launch(ahead=True) or plan
        assert {s: list(s.tokens) for s in self.sequences} == tokens, "planning (and preempting) loses no token"
        reports = self.under_way.pop(0) if self.under_way else []
        for sequence, new in scheduler.update(reports):
            self.streamed[sequence] += new
            if sequence.finish:
                assert sequence not in self.ended, "a request ends once"
                assert sequence not in self.aborted, "what was aborted does not end again"
                self.ended.append(sequence)
                assert not sequence.pages, "pages are free one step later"
        scheduler.count()
        scheduler.check()
        for sequence in self.sequences:
            known = tokens[sequence]
            assert sequence.tokens[: len(known)] == known, "committed text only grows"
            assert sequence.tokens[sequence.prompt_len :] == self.streamed[sequence], "what is committed is streamed"
        self.steps += 1
        return plan

    def _launch(self, ahead: bool) -> StepPlan | None:
        scheduler = self.scheduler
        waiting, was_running = list(scheduler.waiting), list(scheduler.running)
        ready = {s: self._may_start(s) for s in waiting}
        preemptions = scheduler.counters.preemptions
        plan = scheduler.schedule_ahead() if ahead else scheduler.schedule()
        scheduler.check()
        if plan is None:
            return None
        planned = list(scheduler._under_way[-1]) if plan.rows else []
        assert not ahead or scheduler.counters.preemptions == preemptions, "nobody is preempted for a plan made ahead"
        self._check_plan(plan, planned, was_running, ahead)
        self._check_admissions(plan, waiting, ready)
        reports = self.device.execute(plan)
        assert [s.slot for s in planned] == [row.slot for row in plan.rows]
        if plan.rows:
            self.under_way.append(reports)
        return plan

    def drain_requests(self, most: int = 20_000) -> None:
        """Step until nothing is left; what is cached stays."""
        begun = self.steps
        while self.scheduler.busy or self.under_way:
            self.step()
            assert self.steps - begun < most, "some sequence starves"

    def drain(self, most: int = 20_000) -> None:
        """Step until nothing is left, and check that nothing is left behind."""
        self.drain_requests(most)
        self.check_empty()

    def check_empty(self) -> None:
        assert self.pool.free + self.prefix.idle_pages == self.pool.total
        assert sorted(self.scheduler.holdings.free_slots) == list(range(self.max_running))
        self.prefix.clear()
        assert self.prefix.idle_pages == 0
        assert self.pool.free == self.pool.total
        assert len(self.ended) + len(self.aborted) == len(self.sequences)
        for sequence in self.sequences:
            assert sequence.status is Status.FINISHED
            assert (sequence.finish is None) == (sequence in self.aborted)
            made = len(sequence.tokens) - sequence.prompt_len
            if sequence.finish == "length":
                assert made == sequence.request.sampling.max_tokens
            if sequence.finish == "stop":
                assert made <= sequence.request.sampling.max_tokens
                assert sequence.stop_token == sequence.tokens[-1]
            else:
                assert sequence.stop_token is None

    # ---------------------------------------------------------------- what a plan promises

    def _check_plan(self, plan: StepPlan, planned: list[Sequence], was_running: list[Sequence], ahead: bool) -> None:
        scheduler = self.scheduler
        assert sum(row.width for row in plan.rows) <= scheduler.token_budget, "the plan exceeds the token budget"
        assert all(row.width > 0 for row in plan.rows)
        assert plan.rows or not scheduler.busy or ahead, "a step without rows while somebody waits"
        assert len(scheduler.running) <= self.max_running
        running = set(scheduler.running)
        assert set(planned) <= running
        assert {grant.slot for grant in plan.grants} <= {s.slot for s in running}
        for row, sequence in zip(plan.rows, planned, strict=True):
            assert row.slot == sequence.slot
            held = len(sequence.pages) * scheduler.holdings.page_size
            # Of plans made ahead, the device says whether pages are there for what it turns out to run.
            assert ahead or sequence.run_start + row.width <= held, "planned positions have no pages"
        for sequence in running:
            if sequence in planned:
                self.left_out[sequence] = 0
            # A sequence that will have ended has no part in what comes; where pages are short, the next plan waits.
            elif not ahead or not (scheduler._short or sequence.start + 1 >= sequence.limit):
                self.left_out[sequence] = self.left_out.get(sequence, 0) + 1
            else:
                continue
            assert self.left_out[sequence] <= self.max_running, "the budget passes somebody over for ever"
        # Those that were preempted are the youngest: nobody older than a survivor had to go.
        gone = [s.order for s in was_running if s not in running]
        stayed = [s.order for s in was_running if s in running]
        assert not gone or not stayed or min(gone) > max(stayed), "an older sequence was preempted for a younger one"

    def _may_start(self, sequence: Sequence) -> bool:
        """A further choice of a prompt waits for the first one's prefix."""
        leader = sequence.leader
        if leader is None or not self.prefix.enabled or leader.status is Status.FINISHED:
            return True
        return leader.status is Status.RUNNING and not leader.prefilling

    def _check_admissions(self, plan: StepPlan, waiting: list[Sequence], ready: dict[Sequence, bool]) -> None:
        """First come, first served, but for choices that wait for their prompt's first one."""
        assert [s.order for s in waiting] == sorted(s.order for s in waiting)
        slots = {admission.slot for admission in plan.admissions}
        admitted = [s for s in waiting if s.slot in slots and s.status is Status.RUNNING]
        assert len(admitted) == len(plan.admissions)
        if admitted:
            passed = [s for s in waiting if s.order < admitted[-1].order and s not in admitted and ready[s]]
            assert not passed, "an admission overtook an older request"
        for sequence in admitted:
            cached, unit = sequence.final_len, self.prefix.unit_tokens
            assert cached % unit == 0, "a prefix hit is a number of whole units"
            assert cached < len(sequence.tokens), "the last unit is always recomputed"
            assert cached <= sequence.start
            if not sequence.forwards:
                assert sequence.cached_tokens == cached
