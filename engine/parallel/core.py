"""The engine core of several ranks: rank 0 schedules, and every rank executes its plans on its part of the model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import msgspec
import torch
import zmq

from ..config import EngineConfig
from ..core import EngineCore
from ..errors import EngineDead
from ..flight import Flight
from ..loading import load_model, read_config
from ..machine import choose_device
from ..models.backbone import backbone_from_config
from ..models.source import resolve_model
from ..plan import StepPlan
from ..runner import ModelRunner
from .crew import Crew
from .ranks import Ranks
from .split import check_split


class Plans:
    """Rank 0's plans on their way to the other ranks. endpoints: where each of them gets its own, from rank 1 on."""

    def __init__(self, crew: Crew) -> None:
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[Any]] = []
        for rank in range(1, crew.size):
            # Unlike a broadcast of torch.distributed, this may be waited for as long as nobody asks for anything.
            self._sockets.append(self._context.socket(zmq.PUSH))
            self._sockets[-1].bind(crew.endpoint(str(rank)))
        self.endpoints = [one.getsockopt_string(zmq.LAST_ENDPOINT) for one in self._sockets]
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, plan: StepPlan) -> None:
        message = self._encoder.encode(plan)
        for one in self._sockets:
            one.send(message)

    def end(self) -> None:
        """Say that no more plans come."""
        for one in self._sockets:
            with contextlib.suppress(zmq.Again):  # it is not there, or does not listen
                one.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        self._context.destroy(linger=0)


def follow(ranks: Ranks, config: EngineConfig, endpoints: list[str]) -> None:
    """Ranks 1 and up: execute what rank 0 plans, until it sends nothing."""
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        # What a lost connection held is lost: better none at all than one with a plan missing.
        inbox.setsockopt(zmq.RECONNECT_IVL, -1)
        inbox.connect(endpoints[ranks.rank - 1])
        runner = load_model(config, ranks).runner
        decode, learned = msgspec.msgpack.Decoder(StepPlan).decode, False
        while message := inbox.recv():
            # The reports that count are those of rank 0, which is never more than one step ahead of them.
            plan = decode(message)
            if plan.learning and not learned and runner.graphs is not None:
                runner.graphs.forget_seen()
            learned = plan.learning
            with runner.fusion.learning(learned):
                runner.launch(plan)
        leave(runner)


def leave(runner: ModelRunner) -> None:
    """Let go of what waits for a process group to end: graphs that hold its sums."""
    if runner.graphs is not None:
        if runner.state.device.type == "cuda":
            torch.cuda.synchronize(runner.state.device)
        runner.graphs.clear()


class ParallelCore(EngineCore):
    """Rank 0. The row state of all ranks is the same after every step: what a step reads of the model was summed or
    gathered, and everything else it depends on is in its plan."""

    def __init__(self, config: EngineConfig, crew: type[Crew] = Crew) -> None:
        """crew: who starts the other ranks. Raises ModelError or ConfigError."""
        backbone = backbone_from_config(read_config(resolve_model(config.model))[0])
        check_split(backbone, config.tensor_parallel_size)
        self._crew = crew(config.tensor_parallel_size)
        self._plans = Plans(self._crew)
        try:
            device = choose_device(config, self._crew.devices)
            self._crew.start(device, follow, config, self._plans.endpoints, dismiss=self._plans.end)
            super().__init__(load_model(config, self._crew.ranks), check_invariants=config.check_invariants)
        except BaseException:
            self._leave()
            raise

    def launch(self, plan: StepPlan) -> Flight | None:
        self._plans.send(replace(plan, learning=self.runner.fusion.is_learning))
        try:
            return super().launch(plan)
        except Exception as error:
            # The others may have gone on, out of memory though this one was: nothing can be tried again.
            raise EngineDead(f"a forward of {self._crew.size} ranks failed: {error}") from error

    def close(self) -> None:
        leave(self.runner)
        self._leave()

    def _leave(self) -> None:
        self._crew.close()
        self._plans.close()
