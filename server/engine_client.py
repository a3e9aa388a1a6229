"""The server's end of the two sockets to an engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from linocut.engine.errors import ConfigError, EngineDead, EngineStopped
from linocut.engine.messages import (
    Abort,
    AddRequest,
    EngineInput,
    EngineOutput,
    EngineStats,
    Fatal,
    ModelInfo,
    Outputs,
    Ready,
    Shutdown,
)
from linocut.engine.parallel.process import Process

from .engine_launch import STOP_SECONDS, Launch, ask_for_stacks, obituary, stop_process
from .submission import Submission
from .watchdog import Watchdog

log = logging.getLogger(__name__)


class EngineClient:
    """Binds two sockets, launches the engine, hands out its outputs and notices its death.

    `model` and `stats` are valid after `start`. `dead` is an Event that is set once, when the engine is gone or hangs
    (`Watchdog`); `failure` then says why. patience: seconds without a step, of an engine with work, until it hangs.
    number: for the log, where a server has several.
    """

    model: ModelInfo

    def __init__(self, launch: Launch, patience: float = 60.0, number: int = 0) -> None:
        self._launch = launch
        self._number = number
        self._watchdog = Watchdog(patience)
        self._interval = min(1.0, patience / 4)
        self._stalled = False
        self._process: Process | None = None
        self._submissions: dict[str, Submission] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[ModelInfo] | None = None
        self._watched: int | None = None
        self._loaded = False
        self._closing = False
        self._cleanup = contextlib.ExitStack()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(EngineOutput).decode
        self.stats = EngineStats()
        self.in_flight = 0  # choices
        self._heard = time.monotonic()
        self.dead = asyncio.Event()
        self.failure = ""

    async def start(self) -> ModelInfo:
        """Launch the engine and wait until its model is loaded. Raises EngineDead with its last words."""
        input_endpoint, output_endpoint = self._open()
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._tasks.append(loop.create_task(self._receive()))
        self._process = self._launch.start(input_endpoint, output_endpoint)
        self._watched = self._process.sentinel
        loop.add_reader(self._watched, self._on_exit)
        self.model = await self._ready
        self._loaded = True
        self._tasks.append(loop.create_task(self._watch()))
        return self.model

    def _open(self) -> tuple[str, str]:
        """Bind both sockets and return their endpoints. Raises ConfigError."""
        context = zmq.Context()
        # Plain, not asyncio: sending never waits, so that an abort leaves at once, from any finally clause.
        self._input = context.socket(zmq.PUSH)
        self._input.setsockopt(zmq.SNDHWM, 0)
        self._output = zmq.asyncio.Context.shadow(context).socket(zmq.PULL)
        self._output.setsockopt(zmq.RCVHWM, 0)
        self._folder = Path(tempfile.mkdtemp(prefix="linocut-"))  # mode 0700: only our user may connect
        self._cleanup.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._cleanup.callback(context.term)
        self._cleanup.callback(self._output.close, linger=0)
        self._cleanup.callback(self._input.close, linger=0)
        try:
            return self._bind(self._input, "input"), self._bind(self._output, "output")
        except zmq.ZMQError as error:
            where = self._launch.interface or f"{self._folder} (TMPDIR names the place)"
            raise ConfigError(f"cannot open sockets in {where}: {error}") from error

    def _bind(self, socket: zmq.Socket[Any], name: str) -> str:
        if self._launch.interface is None and os.name == "posix":
            endpoint = f"ipc://{self._folder / name}"
            socket.bind(endpoint)
            return endpoint
        socket.bind(f"tcp://{self._launch.interface or '127.0.0.1'}:*")
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def alive(self) -> bool:
        return self._process is not None and not self.dead.is_set() and not self._closing

    @property
    def silence(self) -> float:
        """Seconds since the engine's last message, or since it was launched."""
        return time.monotonic() - self._heard

    def add(self, request: AddRequest, submission: Submission) -> None:
        """Send a request of a submission, which gets its outputs. `Replicas` has made sure that there is room."""
        self.in_flight += request.n
        self._submissions[request.request_id] = submission
        self._send(request)

    def abort(self, submission: Submission, request_id: str, choice: int | None = None) -> None:
        """End a submission's request, or one choice of it. Called by `Submission`."""
        closed = {key for key in submission.open if key[0] == request_id and choice in (None, key[1])}
        submission.open -= closed
        self.in_flight -= len(closed)
        if closed and self.alive:
            self._send(Abort(request_id=request_id, choice=choice))

    def forget(self, request_id: str) -> None:
        self._submissions.pop(request_id, None)

    def _send(self, message: EngineInput) -> None:
        try:
            self._input.send(self._encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:  # no peer: the engine has closed its end and its exit is about to be noticed
            if self.alive:
                self._die(f"the engine does not take messages ({error})")

    async def _receive(self) -> None:
        try:
            while True:
                self._handle(self._decode(await self._output.recv()))
        except Exception as error:  # a receiver that ends silently leaves every client waiting
            self._die(f"the engine's messages cannot be read any more: {error!r}")

    def _handle(self, message: EngineOutput) -> None:
        match message:
            case Outputs():
                self._deliver(message)
            case Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message.model)
            case Fatal():
                self._die(message.error)

    def _deliver(self, message: Outputs) -> None:
        self._watchdog.hear(message.stats)
        if message.stats is not None:
            self.stats = message.stats
        self._heard = time.monotonic()
        for output in message.outputs:
            submission = self._submissions.get(output.request_id)
            if submission is not None and submission.deliver(output) and output.finish_reason is not None:
                self.in_flight -= 1

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        seen = loop.time()
        while not self._watchdog.stalled:
            await asyncio.sleep(self._interval)
            # If we come late, this process was stopped or busy, and messages of the engine wait to be read.
            self._watchdog.wait(min(loop.time() - seen, 2 * self._interval))
            seen = loop.time()
        if self.alive:
            self._stalled = True
            assert self._process is not None
            ask_for_stacks(self._process)
            self._die(f"no step in {self._watchdog.silence:.0f} s with {self.in_flight} choices in flight: it hangs")

    def _on_exit(self) -> None:
        self._unwatch()
        if not self._closing:
            # Its last message may still be in the socket: let the receiver read it first.
            self._tasks.append(asyncio.get_running_loop().create_task(self._bury()))

    async def _bury(self) -> None:
        await asyncio.sleep(0.05)
        assert self._process is not None
        self._process.join(0.5)
        self._die(obituary(self._process.exitcode))

    def _die(self, reason: str) -> None:
        if self.dead.is_set() or self._closing:
            return
        self.failure = reason
        if self._loaded:  # else `start` raises it
            log.error("engine %d died: %s", self._number, reason)
        self.dead.set()
        self._fail_all(EngineDead(reason))

    def _fail_all(self, error: EngineDead) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        for request_id, submission in self._submissions.items():
            submission.fail(request_id, error)
        self._submissions.clear()
        self.in_flight = 0

    def _unwatch(self) -> None:
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None

    async def close(self) -> None:
        """Stop the engine (kindly, then not) and free sockets and files. In-flight requests get EngineStopped."""
        if self._closing:
            return
        was_alive, self._closing = self.alive, True
        if was_alive:
            self._send(Shutdown())
        self._fail_all(EngineStopped("the server is shutting down"))
        self._unwatch()
        if self._process is not None:
            # An engine that still loads, or hangs, does not read its messages.
            patience = STOP_SECONDS if self._loaded and not self._stalled else 0.0
            await asyncio.get_running_loop().run_in_executor(None, stop_process, self._process, patience)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._cleanup.close()
