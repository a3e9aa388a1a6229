"""An engine that speaks the real one's messages and follows a script: for tests of everything in front of it."""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgspec
import zmq

from linocut.engine.decoding.registry import offered
from linocut.engine.family import FamilyTraits
from linocut.engine.messages import (
    Abort,
    AddRequest,
    ChoiceOutput,
    EngineInput,
    EngineStats,
    Fatal,
    ModelInfo,
    Outputs,
    Ready,
    Shutdown,
)

MASK, IM_START, IM_END = 2, 0, 1
TRAITS = FamilyTraits("fake", "block-causal", "own", 8, 8, MASK, (IM_END,))


def model_info(**changes: Any) -> ModelInfo:
    base = ModelInfo(
        family="fake",
        context="block-causal",
        block_size=8,
        vocab_size=1000,
        max_model_len=512,
        mask_id=MASK,
        stop_ids=(IM_END,),
        banned_ids=(MASK,),
        strategy_table=offered(TRAITS).strategy_table,
        default_strategy="threshold",
        default_parameters={},
        default_sampling={},
        dtype="float32",
        device="cpu",
        device_name="made up",
        numerics="fast",
        attention="torch",
        quantization="none",
        prefix_caching=True,
        token_budget=512,
        page_size=16,
        pages=64,
        max_running=16,
        max_queued=16,
    )
    return msgspec.structs.replace(base, **changes)


@dataclass(frozen=True)
class Step:
    """Tokens committed `after` seconds since the step before."""

    tokens: list[int]
    finish: str | None = None
    stop_token: int | None = None
    after: float = 0.0
    error: str | None = None


Script = Callable[[AddRequest, int], Iterable[Step]]  # (request, choice) -> steps


def say(tokens: list[int], chunk: int = 3, after: float = 0.0) -> Script:
    """Answers that commit `tokens`, `chunk` at a time, and end with the stop id or at max_tokens."""

    def script(request: AddRequest, choice: int) -> Iterable[Step]:
        limit = request.sampling.max_tokens
        ends = len(tokens) < limit
        answer = [*tokens, IM_END] if ends else tokens[:limit]
        for start in range(0, len(answer), chunk):
            piece = answer[start : start + chunk]
            last = start + chunk >= len(answer)
            finish = ("stop" if ends else "length") if last else None
            yield Step(piece, finish, IM_END if last and ends else None, after)

    return script


def silence(request: AddRequest, choice: int) -> Iterable[Step]:
    """Never answers."""
    return ()


@dataclass
class FakeEngine:
    """A thread in the place of the engine process; also what `EngineClient` takes for that process."""

    script: Script = silence
    info: ModelInfo = field(default_factory=model_info)
    load_seconds: float = 0.0
    stats: EngineStats = field(default_factory=EngineStats)

    def __post_init__(self) -> None:
        self.adds: list[AddRequest] = []
        self.aborts: list[Abort] = []
        self.exitcode: int | None = None
        self._stop = threading.Event()
        self._launched = False
        self._fatal: str | None = None
        self.pid = None
        self.hangs = threading.Event()
        self.sentinel, self._alive_end = os.pipe()

    def launch(self, input_endpoint: str, output_endpoint: str) -> FakeEngine:
        assert not self._launched, "a process runs once"
        self._launched = True
        self.input_endpoint = input_endpoint
        self._thread = threading.Thread(target=self._run, args=(input_endpoint, output_endpoint), daemon=True)
        self._thread.start()
        return self

    def hang(self) -> None:
        """Read and say nothing any more."""
        self.hangs.set()

    def die(self, fatal: str | None = None) -> None:
        """End like a crashed process, with or without last words."""
        self._fatal = fatal
        self.exitcode = 1
        self._stop.set()

    def wait_for(self, condition: Callable[[FakeEngine], bool], seconds: float = 5.0) -> bool:
        deadline = time.monotonic() + seconds
        while not condition(self):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    # What EngineClient needs of a process.
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def kill(self) -> None:
        self._stop.set()
        self.hangs.clear()

    def _run(self, input_endpoint: str, output_endpoint: str) -> None:
        run_script(self, input_endpoint, output_endpoint)
        os.close(self._alive_end)

    def serve(self, receive: zmq.Socket[bytes], send: Callable[[Any], None]) -> None:
        if not self._stop.wait(self.load_seconds):
            send(Ready(model=self.info))
        decoder = msgspec.msgpack.Decoder(EngineInput)
        due: list[tuple[float, int, ChoiceOutput]] = []
        order = count()
        closed: set[tuple[str, int | None]] = set()
        published = time.monotonic()
        while not self._stop.is_set():
            if self.hangs.is_set():
                time.sleep(0.01)
                continue
            wait = 5.0 if not due else max(0.0, min(5.0, (due[0][0] - time.monotonic()) * 1000))
            if receive.poll(wait):
                message = decoder.decode(receive.recv())
                if isinstance(message, Shutdown):
                    self.exitcode = 0
                    return
                if isinstance(message, Abort):
                    self.aborts.append(message)
                    closed.add((message.request_id, message.choice))
                else:
                    self.adds.append(message)
                    for moment, output in self._outputs(message):
                        heapq.heappush(due, (moment, next(order), output))
            outputs = []
            while due and due[0][0] <= time.monotonic():
                output = heapq.heappop(due)[2]
                if not closed & {(output.request_id, None), (output.request_id, output.choice)}:
                    outputs.append(output)
            # Like the real one, it is never silent for long.
            if outputs or time.monotonic() - published > 0.05:
                send(Outputs(outputs=outputs, stats=self.stats))
                published = time.monotonic()
        if self._fatal is not None:
            send(Fatal(error=self._fatal))

    def _outputs(self, request: AddRequest) -> Iterable[tuple[float, ChoiceOutput]]:
        for choice in range(request.n):
            moment = time.monotonic()
            for number, step in enumerate(self.script(request, choice), 1):
                moment += step.after
                yield (
                    moment,
                    ChoiceOutput(
                        request_id=request.request_id,
                        choice=choice,
                        token_ids=step.tokens,
                        finish_reason=step.finish,  # type: ignore[arg-type]
                        stop_token=step.stop_token,
                        error=step.error,
                        forwards=number,
                        positions=number * 8,
                        cached_tokens=4,
                        queue_seconds=0.25,
                        prefill_seconds=0.5,
                    ),
                )


def run_script(engine: FakeEngine, input_endpoint: str, output_endpoint: str) -> None:
    """Connect and serve; the target of a real process as well as of the thread."""
    context = zmq.Context()
    receive, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    receive.connect(input_endpoint)
    push.setsockopt(zmq.LINGER, 1000)
    push.connect(output_endpoint)
    try:
        engine.serve(receive, lambda message: push.send(msgspec.msgpack.encode(message)))
    finally:
        receive.close(0)
        push.close()
        context.term()
