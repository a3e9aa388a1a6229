"""The engine process: a core behind two ZeroMQ sockets."""

from __future__ import annotations

import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
import threading
import time

import msgspec
import zmq

from .config import EngineConfig
from .core import EngineCore
from .cores import Core, load_core
from .errors import ParameterError
from .machine import share_machine
from .messages import Abort, AddRequest, ChoiceOutput, EngineInput, EngineOutput, Fatal, Outputs, Ready, Shutdown
from .parallel.crew import Crew
from .warm_up import make_ready

log = logging.getLogger("linocut.engine")

# Seconds between statistics when nothing else is sent.
STATS_INTERVAL = 0.5


class EngineProcess:
    """Reads inputs between steps, steps while there is work, sends what was committed."""

    def __init__(
        self, config: EngineConfig, input_endpoint: str, output_endpoint: str, crew: type[Crew] = Crew
    ) -> None:
        """crew: who starts the further ranks of a model that several processes hold."""
        self._context = zmq.Context(1)
        self._input = self._context.socket(zmq.PULL)
        self._output = self._context.socket(zmq.PUSH)
        # Give the server this long to take the last message; then leave, whatever it does.
        self._output.setsockopt(zmq.LINGER, 2000)
        for one in (self._input, self._output):
            # What a lost connection held is lost, and a text with a hole is worse than an engine that is silent.
            one.setsockopt(zmq.RECONNECT_IVL, -1)
        self._input.connect(input_endpoint)
        self._output.connect(output_endpoint)
        self._decoder = msgspec.msgpack.Decoder(EngineInput)
        self._encoder = msgspec.msgpack.Encoder()
        self._config, self._crew = config, crew

    def run(self) -> None:
        """Load the model and serve until Shutdown. Any exception is reported as Fatal and raised again."""
        core: Core | None = None
        try:
            core = load_core(share_machine(self._config), self._crew)
            if isinstance(core, EngineCore):
                make_ready(core, self._config.warm_up)
            # What is there by now stays: the collector need not look through it again, in the middle of a step.
            gc.collect()
            gc.freeze()
            self._send(Ready(model=core.info))
            self._serve(core)
        except BaseException as error:
            self._send(Fatal(error=f"{type(error).__name__}: {error}"[:2000]))
            raise
        finally:
            self._input.close(linger=0)
            self._output.close()
            self._context.term()
            if core is not None:
                core.close()

    def _serve(self, core: Core) -> None:
        published = 0.0
        while True:
            outputs: list[ChoiceOutput] = []
            for message in self._receive(wait=not core.busy):
                if isinstance(message, Shutdown):
                    return
                if isinstance(message, Abort):
                    core.abort(message)
                else:
                    outputs += _add(core, message)
            if core.busy:
                outputs += core.step()
            now = time.monotonic()
            if outputs or now - published >= STATS_INTERVAL:
                self._send(Outputs(outputs=outputs, stats=core.stats()))
                published = now

    def _receive(self, wait: bool) -> list[AddRequest | Abort | Shutdown]:
        """All messages that are there; with `wait`, at least one unless it is time to publish statistics."""
        messages: list[AddRequest | Abort | Shutdown] = []
        if wait:
            self._input.poll(int(STATS_INTERVAL * 1000))
        while True:
            try:
                data = self._input.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append(self._decoder.decode(data))
            except (msgspec.DecodeError, RecursionError) as error:
                # One bad message must not end everybody's requests, nor leave its own client without an answer.
                log.warning("dropped an input of %d bytes: %s", len(data), error)
                self._refuse(data, str(error))

    def _refuse(self, data: bytes, error: str) -> None:
        try:
            name = msgspec.msgpack.decode(data, type=_Named)
        except (msgspec.DecodeError, RecursionError):
            return
        self._send(Outputs(outputs=_errors(name.request_id, name.n, error)))

    def _send(self, message: EngineOutput) -> None:
        self._output.send(self._encoder.encode(message))


def _add(core: Core, request: AddRequest) -> list[ChoiceOutput]:
    try:
        core.add(request)
    except ParameterError as error:
        # The server validates before it sends; what slips through ends this request alone.
        return _errors(request.request_id, request.n, str(error))
    return []


class _Named(msgspec.Struct):
    """As much of an AddRequest as an answer needs."""

    request_id: str
    n: int = 1


def _errors(request_id: str, n: int, error: str) -> list[ChoiceOutput]:
    return [
        ChoiceOutput(request_id=request_id, choice=choice, token_ids=[], finish_reason="error", error=error[:500])
        for choice in range(min(max(n, 1), 1024))
    ]


def run_engine(config: EngineConfig, input_endpoint: str, output_endpoint: str) -> None:
    """Entry point of the engine process."""
    # Ctrl-C reaches the whole process group, a service manager's SIGTERM perhaps all of a service; the server decides
    # when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        # The server asks where an engine that hangs is.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Not getppid(): the server may have died while this process was importing torch.
    parent = multiprocessing.parent_process()
    server = os.getppid() if parent is None else parent.pid
    threading.Thread(target=_die_with_parent, args=(server,), daemon=True).start()
    EngineProcess(config, input_endpoint, output_endpoint).run()


def _die_with_parent(parent: int | None) -> None:
    """An engine without a server holds memory for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
