"""The canvas core: what `EngineCore` is to the engine process, for models of a fixed canvas."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from linocut.kernels.backend import Backend

from ..histogram import Histogram
from ..machine import is_out_of_memory, release_memory
from ..messages import Abort, AddRequest, ChoiceOutput, EngineStats, ModelInfo
from ..pressure import MemoryPressure
from ..step_clock import StepClock
from ..validation import check_request
from .ancestral import ancestral_step
from .batch import CanvasBatch, build_batch
from .discriminator import Discriminator
from .guided import Guidance, reranked_step, tilted_step
from .row import CanvasRow, lay_out
from .shape import CanvasShape
from .transformer import Denoiser

log = logging.getLogger("linocut.engine")

# A gradient keeps the activations of all layers: canvases of a forward for one of a forward and backward.
_GRADIENT_COST = 8


@dataclass
class LoadedCanvas:
    info: ModelInfo
    shape: CanvasShape
    denoiser: Denoiser
    reward: Discriminator | None
    backend: Backend


@dataclass(frozen=True)
class _Kind:
    """What rows of one forward have in common."""

    name: str
    candidates: int = 0


class CanvasCore:
    """Every step is one denoising step of every running choice, wherever each of them is; others join in between.

    A choice ends with its answer, which may be before its last step: positions up to the first mask are final.
    """

    def __init__(self, model: LoadedCanvas, *, check_invariants: bool = False) -> None:
        self.info = model.info
        self._model = model
        self._check = check_invariants
        self._pressure = MemoryPressure(model.info.token_budget // model.shape.length, 1)
        self._waiting: deque[CanvasRow] = deque()
        self._running: list[CanvasRow] = []
        self._forwards = self._positions = self._committed = self._finished = 0
        self._discarded = {"stop": 0, "length": 0}
        self.clock = StepClock()
        self._steps, self._shapes, self._rows = map(Histogram, ("steps_per_block", "forward_positions", "forward_rows"))

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: AddRequest) -> None:
        """Queue a request's choices. Raises ParameterError if it cannot be served; then nothing was queued."""
        self.validate(request)
        device = self._model.denoiser.device
        rows = [lay_out(self._model.shape, request, choice, device) for choice in range(request.n)]
        for row in rows:
            row.arrived = time.monotonic()
        self._waiting.extend(rows)

    def validate(self, request: AddRequest) -> None:
        """Raise ParameterError for what would harm the engine or cannot fit it. An empty prompt is welcome."""
        in_use = any(row.request.request_id == request.request_id for row in (*self._running, *self._waiting))
        check_request(self.info, request, in_use, needs_prompt=False)

    def abort(self, message: Abort) -> None:
        """End choices silently; unknown ones are ignored."""

        def stays(row: CanvasRow) -> bool:
            return row.request.request_id != message.request_id or message.choice not in (None, row.choice)

        self._waiting = deque(filter(stays, self._waiting))
        self._running = list(filter(stays, self._running))
        if not self.busy:
            self.clock.pause()

    def step(self) -> list[ChoiceOutput]:
        """One denoising step of all that run; one entry per choice whose answer grew or ended."""
        self.clock.begin()
        now = time.monotonic()
        while self._waiting and len(self._running) < self.info.max_running:
            self._running.append(self._waiting.popleft())
            self._running[-1].started = now
        for kind, rows in self._forward_groups():
            self.clock.launch()
            fits = self._fits(kind, rows)
            self.clock.land(time.perf_counter())
            if not fits:
                break
        now = time.monotonic()
        outputs = []
        for row in self._running:
            if row.finish:
                outputs.append(row.output([], "out of memory"))
                continue
            tokens = row.collect()
            self._committed += len(tokens)
            if row.finish:
                self._finished += 1
                self._discarded[row.finish] += row.discarded()
                self._steps.observe(row.step)
            if tokens or row.finish:
                row.first_answered = row.first_answered or now
                outputs.append(row.output(tokens))
        self._running = [row for row in self._running if row.finish is None]
        self.clock.end(self.busy)
        return outputs

    def _fits(self, kind: _Kind, rows: list[CanvasRow]) -> bool:
        """Move the rows on; False if they do not fit the memory.

        They stay where they are, and forwards are smaller from then on; a row that does not fit alone has ended.
        """
        try:
            self._denoise(kind, rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("a forward of %d canvases ran out of memory: %s", len(rows), str(error)[:300])
        else:
            self._pressure.succeed()
            return True
        # Outside of the handler, whose traceback holds the tensors of the forward.
        release_memory(self._model.denoiser.device)
        if not self._pressure.fail(len(rows) * _cost(kind)):
            rows[0].finish = "error"
        return False

    def close(self) -> None:
        """Nothing outlives the process."""

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            oldest_waiting_seconds=time.monotonic() - self._waiting[0].arrived if self._waiting else 0.0,
            forwards_by_kind={"denoise": self._forwards},
            denoise_positions=self._positions,
            committed_tokens=self._committed,
            blocks_finished=self._finished,
            discarded_by_ending=dict(self._discarded),
            step_seconds=self.clock.step_seconds,
            out_of_memory=self._pressure.failures,
            forward_seconds=self.clock.forward_seconds.snapshot(),
            host_gap_seconds=self.clock.host_gap_seconds.snapshot(),
            forward_positions=self._shapes.snapshot(),
            forward_rows=self._rows.snapshot(),
            steps_per_block=self._steps.snapshot(),
        )

    def _forward_groups(self) -> Iterator[tuple[_Kind, list[CanvasRow]]]:
        groups: dict[_Kind, list[CanvasRow]] = {}
        for row in self._running:
            groups.setdefault(_kind(row), []).append(row)
        for kind, rows in groups.items():
            most = max(1, self._pressure.budget // _cost(kind))
            for start in range(0, len(rows), most):
                yield kind, rows[start : start + most]

    def _denoise(self, kind: _Kind, rows: list[CanvasRow]) -> None:
        model = self._model
        batch = build_batch(rows, model.shape.mask_id, model.backend)
        if kind.name == "ancestral":
            ancestral_step(model.denoiser, batch)
        else:
            assert model.reward is not None  # `resolve` lets no guided request pass without one
            if kind.name == "tilted":
                scales = [Guidance.of(row.request.decoding).scale(row.step) for row in rows]
                tilted_step(model.denoiser, model.reward, batch, scales)
            else:
                reranked_step(model.denoiser, model.reward, batch, kind.candidates)
        if self._check:
            _check_progress(rows, batch)
        for index, row in enumerate(rows):
            row.tokens, row.undecided = batch.tokens[index], batch.undecided[index]
            row.step += 1
        self._forwards += 1
        self._positions += batch.tokens.numel()
        self._shapes.observe(batch.tokens.numel())
        self._rows.observe(len(rows))


def _kind(row: CanvasRow) -> _Kind:
    if row.request.decoding.strategy != "guided" or row.step == row.steps:
        return _Kind("ancestral")  # what the last step leaves is drawn without guidance
    guidance = Guidance.of(row.request.decoding)
    return _Kind("tilted") if row.step < guidance.tilted else _Kind("reranked", guidance.candidates)


def _cost(kind: _Kind) -> int:
    """What a row takes of a forward, in canvases."""
    return _GRADIENT_COST if kind.name == "tilted" else 1


def _check_progress(rows: list[CanvasRow], batch: CanvasBatch) -> None:
    for index, row in enumerate(rows):
        tokens, undecided = batch.tokens[index], batch.undecided[index]
        assert not (undecided & ~row.undecided).any(), "a decided position was masked again"
        assert tokens[~row.undecided].equal(row.tokens[~row.undecided]), "a decided position changed"
        assert not (tokens[row.undecided & ~undecided] == batch.mask_id).any(), "a mask was drawn as a token"
        assert row.step < row.steps or not undecided.any(), "masks are left after the last step"
