"""The engine process over real sockets: it serves, it survives bad input, and it leaves when it should."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from tiny_engines import GOLDEN, engine, prompt_of, request, run

from linocut.engine.config import EngineConfig
from linocut.engine.decoding.parameters import resolve
from linocut.engine.decoding.registry import offered
from linocut.engine.family import FamilyTraits
from linocut.engine.messages import (
    Abort,
    AddRequest,
    ChoiceOutput,
    EngineOutput,
    Fatal,
    ModelInfo,
    Outputs,
    Ready,
    Shutdown,
)
from linocut.engine.params import DecodingParams, SamplingParams
from linocut.engine.process import run_engine

# Not an expectation, only an end to waiting for what never comes.
PATIENCE = 90.0
CONFIG = EngineConfig(
    model=str(GOLDEN / "sdar"),
    dtype="float32",
    device="cpu",
    max_model_len=256,
    kv_memory=4 << 20,
    stop_ids=(),
    check_invariants=True,
    threads=1,
)


class Client:
    """The server's end of the sockets, and the process behind them."""

    model: ModelInfo

    def __init__(self, endpoint: Callable[[str], str], config: EngineConfig = CONFIG) -> None:
        self._context = zmq.Context()
        self.inbox, self.outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        for socket, name in ((self.outbox, "in"), (self.inbox, "out")):
            socket.linger = 0
            socket.bind(endpoint(name))
        self._ends = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self.outbox, self.inbox)]
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)
        self.process = multiprocessing.get_context("spawn").Process(target=run_engine, args=(config, *self._ends))
        self.process.start()

    def send(self, message: AddRequest | Abort | Shutdown) -> None:
        self.outbox.send(msgspec.msgpack.encode(message))

    def receive(self) -> Ready | Outputs | Fatal:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.inbox.poll(200):
                message: Ready | Outputs | Fatal = self._decoder.decode(self.inbox.recv())
                return message
            assert self.process.is_alive(), f"the engine left with status {self.process.exitcode}"
        raise TimeoutError("nothing came")

    def ready(self) -> ModelInfo:
        message = self.receive()
        assert isinstance(message, Ready), message
        return message.model

    def step(self) -> Outputs:
        message = self.receive()
        assert isinstance(message, Outputs), message
        return message

    def outputs(self, *names: str, choices: int = 1) -> dict[str, list[ChoiceOutput]]:
        """What comes for the requests `names`, until all `choices` of each have ended."""
        got: dict[str, list[ChoiceOutput]] = {name: [] for name in names}
        while any(sum(output.finish_reason is not None for output in got[name]) < choices for name in names):
            for output in self.step().outputs:
                got.setdefault(output.request_id, []).append(output)
        return got

    def leaves(self) -> int | None:
        self.process.join(PATIENCE)
        return self.process.exitcode

    def close(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._context.destroy(linger=0)


def ipc(folder: Path) -> Callable[[str], str]:
    return lambda name: f"ipc://{folder}/{name}"


def tcp(name: str) -> str:
    return "tcp://127.0.0.1:*"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One engine over ipc for the tests that it must survive."""
    client = Client(ipc(tmp_path_factory.mktemp("ipc")))
    client.model = client.ready()
    yield client
    client.close()


def add(name: str, prompt: list[int], max_tokens: int = 20, **fields: Any) -> AddRequest:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **fields.pop("sampling", {})})
    decoding = fields.pop("decoding", None) or resolve(SDAR, fields.pop("diffusion", None))
    return AddRequest(request_id=name, prompt=prompt, sampling=sampling, decoding=decoding, **fields)


class SDAR:
    strategy_table = offered(FamilyTraits("sdar", "block-causal", "own", 4, 4, 311, ())).strategy_table


def test_it_says_what_it_has_loaded(shared: Client) -> None:
    model = shared.model
    assert (model.family, model.context, model.block_size, model.vocab_size) == ("sdar", "block-causal", 4, 320)
    assert (model.max_model_len, model.mask_id, model.stop_ids) == (256, 311, ())
    assert (model.dtype, model.device, model.default_strategy) == ("float32", "cpu", "threshold")
    assert resolve(model, None).values == model.default_parameters


def test_it_streams_what_the_engine_commits(shared: Client) -> None:
    prompt = prompt_of(21)
    shared.send(add("a", prompt, 40, n=2))
    outputs = shared.outputs("a", choices=2)["a"]
    core = engine("sdar")
    want = run(core, [request(core, "a", prompt, 40)])["a", 0]
    for choice in (0, 1):
        mine = [output for output in outputs if output.choice == choice]
        assert [token for output in mine for token in output.token_ids] == want.tokens
        assert [output.finish_reason for output in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1].forwards >= len(mine)


def test_requests_that_run_together_do_not_mix(shared: Client) -> None:
    core = engine("sdar")
    prompts = {f"r{i}": prompt_of(3 + 9 * i, seed=i) for i in range(6)}
    want = run(core, [request(core, name, prompt, 30) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        shared.send(add(name, prompt, 30))
    got = shared.outputs(*prompts)
    for name in prompts:
        assert [token for output in got[name] for token in output.token_ids] == want[name, 0].tokens


def test_statistics_come_with_outputs_and_without(shared: Client) -> None:
    shared.send(add("s", prompt_of(9)))
    shared.outputs("s")
    quiet = shared.step()
    assert quiet.outputs == []
    assert quiet.stats is not None
    assert (quiet.stats.running, quiet.stats.waiting) == (0, 0)
    assert quiet.stats.pages_free + quiet.stats.pages_cached == quiet.stats.pages_total
    assert quiet.stats.committed_tokens >= 20


def test_an_abort_ends_a_request_silently(shared: Client) -> None:
    shared.send(add("long", prompt_of(9), 240))
    while not shared.step().outputs:
        pass
    shared.send(Abort(request_id="long"))
    shared.send(Abort(request_id="nobody"))
    shared.send(add("next", prompt_of(9), 8))
    got = shared.outputs("next")
    assert not any(output.finish_reason for output in got.get("long", []))
    last = shared.step()
    while last.stats is None or last.stats.running:
        last = shared.step()
    assert all(output.request_id != "long" for output in last.outputs)


BAD: dict[str, AddRequest] = {
    "no prompt": add("bad", []),
    "an id beyond the vocabulary": add("bad", [5, 320]),
    "a negative id": add("bad", [-5]),
    "an id beyond 64 bits' half": add("bad", [2**40]),
    "too long": add("bad", prompt_of(250), 7),
    "a stop id beyond the vocabulary": add("bad", [5], sampling={"stop_token_ids": (5000,)}),
    "no choices": add("bad", [5], n=0),
    "an unknown strategy": add("bad", [5], decoding=DecodingParams(strategy="nope")),
    "a strategy of other models": add(
        "bad", [5], decoding=DecodingParams(strategy="jacobi", values={"draft_length": 4})
    ),
    "parameters nobody resolved": add(
        "bad", [5], decoding=DecodingParams(strategy="threshold", values={"threshold": "x"})
    ),
    "min_tokens beyond 32 bits": add("bad", [5], sampling={"min_tokens": 2**40}),
}


UNREADABLE = {
    "max_tokens of 0": add("bad", [5], 0),
    "top_p of 0": add("bad", [5], sampling={"top_p": 0.0}),
    "a negative temperature": add("bad", [5], sampling={"temperature": -1.0}),
}


@pytest.mark.parametrize("kind", list(UNREADABLE))
def test_a_request_that_its_decoder_refuses_is_answered_too(shared: Client, kind: str) -> None:
    """Nobody would wait for it in vain."""
    shared.send(UNREADABLE[kind])
    (answer,) = shared.outputs("bad")["bad"]
    assert (answer.finish_reason, answer.token_ids) == ("error", [])


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_request_is_answered_and_the_others_go_on(shared: Client, kind: str) -> None:
    shared.send(add("good", prompt_of(9), 12))
    shared.send(BAD[kind])
    got = shared.outputs("good", "bad")
    assert len(got["good"]) > 0
    assert got["good"][-1].finish_reason == "length"
    (answer,) = got["bad"]
    assert (answer.finish_reason, answer.token_ids) == ("error", [])
    assert answer.error


def test_a_top_k_of_any_size_is_served(shared: Client) -> None:
    shared.send(add("k", prompt_of(9), 8, sampling={"top_k": 2**40, "temperature": 1.0}))
    assert shared.outputs("k")["k"][-1].finish_reason == "length"


def test_a_name_in_use_is_refused_and_its_owner_goes_on(shared: Client) -> None:
    shared.send(add("twice", prompt_of(9), 60))
    shared.send(add("twice", prompt_of(9), 60))
    seen: list[ChoiceOutput] = []
    while sum(output.finish_reason is not None for output in seen) < 2:
        seen += shared.step().outputs
    assert sorted(str(output.finish_reason) for output in seen if output.finish_reason) == ["error", "length"]
    assert sum(len(output.token_ids) for output in seen) == 60


GARBAGE = [
    b"",
    b"\x00",
    b"not msgpack at all",
    os.urandom(64),
    b"\xc1" * 1000,
    msgspec.msgpack.encode(5),
    msgspec.msgpack.encode({"type": "Unheard"}),
    msgspec.msgpack.encode({"type": "AddRequest"}),
    msgspec.msgpack.encode({"type": "Abort", "request_id": 5}),
    msgspec.msgpack.encode(add("x", [5]))[:-3],
    # Bounds that a decoder checks: what the server lets through by mistake must not end everybody's requests.
    msgspec.msgpack.encode(add("x", [5], 0)),
    msgspec.msgpack.encode(add("x", [5], sampling={"top_p": 0.0})),
    b"\x91" * 100_000,
]


def test_garbage_on_the_socket_does_not_end_the_engine() -> None:
    """Over tcp, where anybody on the machine could send it."""
    client = Client(tcp)
    try:
        client.ready()
        client.send(add("running", prompt_of(9), 100))
        for garbage in GARBAGE:
            client.outbox.send(garbage)
        client.outbox.send_multipart([b"one", b"two"])
        client.send(add("after", prompt_of(9), 12))
        got = client.outputs("running", "after")
        assert [got[name][-1].finish_reason for name in ("running", "after")] == ["length", "length"]
    finally:
        client.close()


def test_shutdown_ends_it_at_once_with_status_0(tmp_path: Path) -> None:
    client = Client(ipc(tmp_path))
    try:
        client.ready()
        # Ctrl-C reaches the whole group; when the engine stops is the server's decision.
        assert client.process.pid is not None
        os.kill(client.process.pid, signal.SIGINT)
        client.send(add("running", prompt_of(9), 200))
        client.step()
        client.send(Shutdown())
        assert client.leaves() == 0
    finally:
        client.close()


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    client = Client(ipc(tmp_path), msgspec.structs.replace(CONFIG, model=str(tmp_path)))
    try:
        message = client.receive()
        assert isinstance(message, Fatal)
        assert "ModelError" in message.error
        assert "config.json" in message.error
        assert client.leaves() not in (0, None)
    finally:
        client.close()


@pytest.mark.parametrize("when", ["serving", "starting"])
def test_it_does_not_outlive_its_parent(tmp_path: Path, when: str) -> None:
    """A server that is killed cannot say goodbye; an engine without one would hold its memory for ever."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    arguments = [CONFIG.model, f"ipc://{tmp_path}", when]
    server = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    orphan = psutil.Process(int(server.stdout.readline()))
    try:
        assert orphan.is_running()
        server.kill()
        server.wait()
        gone, _ = psutil.wait_procs([orphan], timeout=20)
        assert gone, "the engine outlived its server"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        if orphan.is_running():
            orphan.kill()


def test_a_connection_that_was_lost_is_not_made_again() -> None:
    """What was under way in it is lost, and nobody could tell which tokens are missing."""
    client = Client(tcp)
    try:
        client.ready()
        endpoint = client.inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        client.inbox.close(linger=0)
        client.inbox = client._context.socket(zmq.PULL)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                client.inbox.bind(endpoint)
                break
            except zmq.ZMQError:  # it is being closed
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert not client.inbox.poll(3000), "it goes on as if nothing had been lost"
        assert client.process.is_alive()
    finally:
        client.close()


PARENT = textwrap.dedent("""
    import multiprocessing, sys, time
    import zmq
    from linocut.engine.config import EngineConfig
    from linocut.engine.process import run_engine

    if __name__ == "__main__":
        model, endpoint, when = sys.argv[1:]
        config = EngineConfig(model=model, device="cpu", dtype="float32", max_model_len=64, kv_memory=1 << 20)
        inbox = zmq.Context.instance().socket(zmq.PULL)
        inbox.bind(endpoint + "/out")
        engine = multiprocessing.get_context("spawn").Process(
            target=run_engine, args=(config, endpoint + "/in", endpoint + "/out")
        )
        engine.start()
        if when == "serving":
            inbox.recv()
        print(engine.pid, flush=True)
        time.sleep(600)
""")
