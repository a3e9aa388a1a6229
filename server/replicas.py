"""The engines of one server: each request goes to one of them, and one that dies is started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from linocut.engine.errors import EngineDead, LinocutError
from linocut.engine.messages import AddRequest, ModelInfo

from .engine_client import EngineClient
from .engine_launch import Launch
from .routing import Router
from .submission import Submission

log = logging.getLogger(__name__)

# Seconds before each attempt to start a dead engine again; then it stays away.
PAUSES = (0.0, 5.0, 30.0)
# An engine that lived for so many seconds has all its attempts again.
RECOVERED = 600.0
# Share of the choices which an engine runs together that it may have more than another one and be preferred for its
# cache: a prefill saved is worth less than a place among the running.
SLACK = 0.25


class QueueFull(LinocutError):
    """As many choices are running and queued as the engines take."""


class Replicas:
    """One engine or several with the same model, on this host or wherever their launches put them.

    `model` is valid after `start`. The requests of an engine that dies fail, and it is started again while another one
    lives, or comes back: engines elsewhere do, as whoever would start this server anew could only wait for the same.
    `dead` is set once, when no engine is left; `failure` then says why the last one died.
    """

    model: ModelInfo

    def __init__(self, launches: Sequence[Launch], patience: float = 60.0) -> None:
        self._launches = launches
        self._patience = patience
        self.engines = [self._new(number) for number in range(len(launches))]
        self._keepers: list[asyncio.Task[None]] = []
        self._endings: set[asyncio.Task[None]] = set()
        self._closing = False
        self._returning: set[int] = set()
        self.dead = asyncio.Event()
        self.failure = ""

    def _new(self, number: int) -> EngineClient:
        return EngineClient(self._launches[number], self._patience, number)

    async def start(self) -> None:
        """Launch all engines and wait until their models are loaded. Raises EngineDead if one of them fails."""
        await asyncio.gather(*(engine.start() for engine in self.engines))
        # Cards may differ in what they have left; what is promised to clients holds for all.
        self.model = min((engine.model for engine in self.engines), key=lambda model: model.max_model_len)
        self._router = Router([_cached(engine.model) for engine in self.engines], max(1, _slack(self.model)))
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(len(self.engines))]

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._closing and any(engine.alive for engine in self.engines)

    @property
    def in_flight(self) -> int:
        return sum(engine.in_flight for engine in self.engines)

    @property
    def capacity(self) -> int:
        """Choices that may be in flight together while all engines live."""
        return sum(engine.model.capacity for engine in self.engines)

    def submit(self, requests: list[AddRequest]) -> Submission:
        """Send requests that stand or fall together. Raises QueueFull or EngineDead; then nothing was sent."""
        if not self.alive:
            raise EngineDead(self.failure or "the engine is not running")
        placed = self._place(requests)
        submission = Submission(requests, placed)
        for request in requests:
            placed[request.request_id].add(request, submission)
        return submission

    def _place(self, requests: list[AddRequest]) -> dict[str, EngineClient]:
        """An engine for each request. Raises QueueFull."""
        loads = {number: engine.in_flight for number, engine in enumerate(self.engines) if engine.alive}
        placed: dict[str, EngineClient] = {}
        for request in requests:
            free = {n: load for n, load in loads.items() if load + request.n <= self.engines[n].model.capacity}
            if not free:
                raise QueueFull(f"{self.in_flight} of {self.capacity} places are taken")
            number = self._router.route(request, free)
            loads[number] += request.n
            placed[request.request_id] = self.engines[number]
        return placed

    async def _keep(self, number: int) -> None:
        """Have an engine that dies started again."""
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            engine, began = self.engines[number], loop.time()
            await engine.dead.wait()
            self.failure = engine.failure
            if self._launches[number].interface is not None:
                self._returning.add(number)
            if self._none_left():
                return
            self._router.forget(number)
            await asyncio.shield(self._end(engine))
            if loop.time() - began > RECOVERED:
                tries = 0
            fresh = None
            while fresh is None and tries < len(PAUSES):
                await asyncio.sleep(PAUSES[tries])
                tries += 1
                fresh = await self._restart(number)
            self._returning.discard(number)
            if fresh is None:
                log.error("engine %d was started %d times and stays away", number, tries)
                self._none_left()
                return
            self._router.resize(number, _cached(fresh.model))
            self.engines[number] = fresh

    def _none_left(self) -> bool:
        """Whether no engine lives or comes back; `dead` then says so."""
        if not self.alive and not self._returning:
            self.dead.set()
        return self.dead.is_set()

    async def _restart(self, number: int) -> EngineClient | None:
        """A new engine with its model loaded; None if it fails."""
        log.info("engine %d is started again", number)
        fresh = self._new(number)
        try:
            await fresh.start()
        except LinocutError as error:
            log.error("engine %d did not start: %s", number, error)
            self._end(fresh)
            return None
        except BaseException:
            self._end(fresh)
            raise
        return fresh

    def _end(self, engine: EngineClient) -> asyncio.Task[None]:
        """Close an engine, whatever becomes of the caller; `close` waits for it."""
        ending = asyncio.create_task(engine.close())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return ending

    async def close(self) -> None:
        """Stop all engines (kindly, then not). In-flight requests get EngineStopped."""
        self._closing = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for engine in self.engines:
            self._end(engine)
        await asyncio.gather(*self._endings)


def _cached(model: ModelInfo) -> int:
    """Tokens whose K/V an engine keeps for requests that share a prompt's beginning."""
    return model.pages * model.page_size if model.prefix_caching else 0


def _slack(model: ModelInfo) -> int:
    return int(model.max_running * SLACK)
