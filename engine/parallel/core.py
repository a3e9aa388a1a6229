"""The engine core of several ranks: rank 0 schedules, and every rank executes its plans on its part of the model."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
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
from ..plan import StepPlan
from .crew import Crew
from .ranks import Ranks
from .split import check_split


class EngineCrew(Crew):
    """Ranks that execute the plans they are sent."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._plans = tempfile.TemporaryDirectory(prefix="linocut-")
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[Any]] = []
        endpoints = [f"ipc://{Path(self._plans.name) / str(rank)}" for rank in range(1, config.tensor_parallel_size)]
        for endpoint in endpoints:
            # Unlike a broadcast of torch.distributed, this may be waited for as long as nobody asks for anything.
            self._sockets.append(self._context.socket(zmq.PUSH))
            self._sockets[-1].bind(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        super().__init__(config.tensor_parallel_size, device, follow, config, endpoints)

    def send(self, plan: StepPlan) -> None:
        message = self._encoder.encode(plan)
        for one in self._sockets:
            one.send(message)

    def dismiss(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(zmq.Again):  # it is not there, or does not listen
                one.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        super().close()
        self._context.destroy(linger=0)
        self._plans.cleanup()


def follow(ranks: Ranks, config: EngineConfig, endpoints: list[str]) -> None:
    """Ranks 1 and up: execute what rank 0 plans, until it sends nothing."""
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.connect(endpoints[ranks.rank - 1])
        runner = load_model(config, ranks).runner
        decode = msgspec.msgpack.Decoder(StepPlan).decode
        while message := inbox.recv():
            # The reports that count are those of rank 0, which is never more than one step ahead of them.
            runner.launch(decode(message))


class ParallelCore(EngineCore):
    """Rank 0. The row state of all ranks is the same after every step: what a step reads of the model was summed or
    gathered, and everything else it depends on is in its plan."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ModelError or ConfigError."""
        device = choose_device(config)
        check_split(backbone_from_config(read_config(Path(config.model))[0]), config.tensor_parallel_size)
        self._crew = EngineCrew(config, device)
        try:
            super().__init__(load_model(config, self._crew.ranks), check_invariants=config.check_invariants)
        except BaseException:
            self._crew.close()
            raise

    def launch(self, plan: StepPlan) -> Flight | None:
        self._crew.send(plan)
        try:
            return super().launch(plan)
        except Exception as error:
            # The others may have gone on, out of memory though this one was: nothing can be tried again.
            raise EngineDead(f"a forward of {self._crew.ranks.size} ranks failed: {error}") from error

    def close(self) -> None:
        if self.runner.graphs is not None:
            self.runner.graphs.clear()
        self._crew.close()
