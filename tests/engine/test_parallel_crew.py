"""The processes of a tensor-parallel engine: they serve together, and they end together."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from rank_pair import some_cases
from test_process import CONFIG, Client, add, ipc
from tiny_engines import GOLDEN, prompt_of

from linocut.engine.config import EngineConfig
from linocut.engine.cores import load_core
from linocut.engine.errors import ConfigError, EngineDead
from linocut.engine.fusion import Fusion
from linocut.engine.geometry import Geometry
from linocut.engine.llm import LLM
from linocut.engine.machine import choose_device, is_out_of_memory
from linocut.engine.messages import Shutdown
from linocut.engine.parallel.core import ParallelCore, follow
from linocut.engine.parallel.crew import Crew
from linocut.engine.params import DecodingParams, SamplingParams
from linocut.engine.plan import Admission, PageGrant, RowPlan, StepPlan

PAIR = msgspec.structs.replace(CONFIG, tensor_parallel_size=2)
# Three seconds from a death to the end of those that are left, and the machine may have other work.
END = 15.0


def member_of(engine: psutil.Process) -> psutil.Process:
    """The other rank: an engine has no other large child."""
    return max(engine.children(), key=lambda child: child.memory_info().rss)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Client]:
    client = Client(ipc(tmp_path), PAIR)
    client.ready()
    yield client
    client.close()


def test_they_answer_and_leave_when_they_are_told(pair: Client) -> None:
    prompt = prompt_of(21)
    pair.send(add("greedy", prompt, 30))
    pair.send(add("sampled", prompt, 30, sampling={"temperature": 0.9, "top_p": 0.9, "seed": 4}))
    got = pair.outputs("greedy", "sampled")
    with_one = LLM(CONFIG.model, dtype="float32", device="cpu", stop_ids=())
    for name, sampling in (("greedy", {"temperature": 0.0}), ("sampled", {"temperature": 0.9, "top_p": 0.9})):
        ((want,),) = with_one.generate([prompt], max_tokens=30, seed=4, **sampling)
        assert [token for output in got[name] for token in output.token_ids] == want.token_ids
    member = member_of(psutil.Process(pair.process.pid))
    pair.send(Shutdown())
    assert pair.leaves() == 0
    assert not member.is_running()


@pytest.mark.parametrize("busy", [True, False])
def test_when_a_member_dies_the_engine_ends(pair: Client, busy: bool) -> None:
    if busy:
        pair.send(add("long", prompt_of(9), 240))
        pair.step()
    member_of(psutil.Process(pair.process.pid)).kill()
    killed = time.monotonic()
    pair.process.join(END)
    assert time.monotonic() - killed < END, "it hangs"
    assert pair.process.exitcode not in (0, None)


def test_when_rank_0_dies_its_member_ends(pair: Client) -> None:
    member = member_of(psutil.Process(pair.process.pid))
    pair.process.kill()
    assert psutil.wait_procs([member], timeout=END)[1] == []


def test_the_offline_api_needs_no_farewell(tmp_path: Path) -> None:
    """Processes of a program that ends without `close` end with it."""
    program = tmp_path / "program.py"
    fields = {"dtype": "float32", "device": "cpu", "stop_ids": [], "tensor_parallel_size": 2}
    program.write_text(
        f"""
from linocut.engine.llm import LLM
import json, psutil

if __name__ == "__main__":
    llm = LLM({str(GOLDEN / "sdar_moe")!r}, **{fields!r})
    ((answer,),) = llm.generate([{prompt_of(9)!r}], max_tokens=24, temperature=0.0)
    print(json.dumps([answer.token_ids, [child.pid for child in psutil.Process().children()]]))
"""
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    tokens, children = json.loads(done.stdout)
    single = LLM(str(GOLDEN / "sdar_moe"), dtype="float32", device="cpu", stop_ids=())
    ((want,),) = single.generate([prompt_of(9)], max_tokens=24, temperature=0.0)
    assert tokens == want.token_ids
    assert children
    left = [psutil.Process(child) for child in children if psutil.pid_exists(child)]
    assert psutil.wait_procs(left, timeout=END)[1] == []


def test_the_conformance_command_runs_on_ranks(golden: Path, tmp_path: Path) -> None:
    folder = some_cases(golden / "sdar", tmp_path / "sdar", {"forward_cases": 4, "decode_cases": 20})
    command = "from linocut.server.cli import main; main()"
    arguments = ["conformance", str(folder), "--tensor-parallel-size", "2"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" passed, 0 failed\n")


# ---------------------------------------------------------------------- without further processes


def test_a_failed_forward_is_the_end_and_never_tried_again() -> None:
    """Even where one rank runs out of memory and would fit a smaller one: the others are elsewhere by then."""

    class Runner:
        fusion = Fusion(on=False)

        def launch(self, plan: StepPlan) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Told:
        def __init__(self) -> None:
            self.plans = list[StepPlan]()

        def send(self, plan: StepPlan) -> None:
            self.plans.append(plan)

    core: Any = object.__new__(ParallelCore)
    core.runner, core._crew = Runner(), Crew(2)
    core._plans = told = Told()
    with pytest.raises(EngineDead, match="out of memory") as caught:
        core.launch(StepPlan())
    assert not is_out_of_memory(caught.value)
    assert len(told.plans) == 1


def test_a_plan_arrives_as_it_was_sent() -> None:
    decoding = DecodingParams(strategy="s", values={"flag": True, "count": 3, "number": 1.0, "name": "x"})
    sampling = SamplingParams(max_tokens=4, temperature=0.5, seed=(1 << 64) - 1, stop_token_ids=(5, 6))
    admission = Admission(
        slot=1, tokens=[4, 5], prompt_len=2, limit=6, suffix=[9], geometry=Geometry(block=4, opens=True), key=7,
        final_len=0, start=0, step=2, window=[1, 2], decided=[True, False], choice=1, sampling=sampling,
        decoding=decoding,
    )  # fmt: skip
    rows = [RowPlan(slot=1, strategy="s", width=8, targets=4, end=12, segments=2, segment=3)]
    plan = StepPlan([admission], [PageGrant(1, 0, [3, 4])], rows, keeps=[(2, 8)], forgets=[9])
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
    assert arrived == plan
    kinds = [type(value) for value in arrived.admissions[0].decoding.values.values()]
    assert kinds == [bool, int, float, str]


def test_a_model_that_cannot_be_split_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size 4 does not divide the model's 2 key-value heads"):
        load_core(msgspec.structs.replace(CONFIG, tensor_parallel_size=4))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    begun: list[str] = []

    class Unbegun:
        """A process that is not started."""

        def __init__(self, target: object, args: tuple[Any, ...], name: str, daemon: bool) -> None:
            begun.append(args[3])

        def start(self) -> None: ...

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", Unbegun)
    config, crew = EngineConfig(model="", device="cuda:1", tensor_parallel_size=3), Crew(3)
    first = choose_device(config, crew.devices)
    for rank in (1, 2):
        crew.begin(rank, first, follow, ())
    assert [str(first), *begun] == ["cuda:1", "cuda:2", "cuda:3"]
    with pytest.raises(ConfigError, match="from cuda:2 on needs 5 GPUs; torch sees 4"):
        choose_device(msgspec.structs.replace(config, device="cuda:2"), crew.devices)
