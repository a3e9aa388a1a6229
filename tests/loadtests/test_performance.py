"""The suite behind docs/performance.md: on tiny shapes, against a tiny server, and its tables from made-up rows."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from linocut.engine.bench.variants import Variant
from linocut.engine.cache.pages import PagePool
from linocut.engine.core import EngineCore
from loadtests.performance import shape_task, vllm_peer
from loadtests.performance.model_tasks import PROMPTS, run_http, run_offline
from loadtests.performance.results import Results
from loadtests.performance.settings import Settings
from loadtests.performance.shape_task import run_shape
from loadtests.performance.sheet import Sheet, read_sheets
from loadtests.performance.streams import run_streams
from loadtests.serving import Served, served
from loadtests.tiny_model import write_model

ROOT = Path(__file__).resolve().parents[2]
NEVER = float("inf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    options = ("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "4M", "--log-level", "error")
    with served(None, str(model), *options) as running:
        yield running


def small(**changes: Any) -> Settings:
    settings = Settings(
        sequences=(1, 3),
        contexts=(64,),
        curve_context=32,
        paces=(1, 4),
        profiled=(2,),
        clients=(2,),
        prefills=(2,),
        prompt=32,
        seconds=0.0,
        warm=0.0,
        tokens=8,
        requests=(2, 2),
        device="cpu",
        tiny=True,
    )
    return dataclasses.replace(settings, **changes)


class TestSheet:
    def test_it_is_whole_after_every_row(self, tmp_path: Path) -> None:
        sheet = Sheet(tmp_path / "a.json", {"task": "a"})
        assert read_sheets(tmp_path) == [{"task": "a", "rows": []}]
        sheet.add(point="p", value=1.23456789)
        sheet.note(finished=True)
        assert read_sheets(tmp_path) == [{"task": "a", "finished": True, "rows": [{"point": "p", "value": 1.2346}]}]

    def test_what_fails_is_written_down_and_the_rest_goes_on(self, tmp_path: Path) -> None:
        sheet = Sheet(tmp_path / "a.json", {})

        def fail() -> dict[str, Any]:
            raise ValueError("no")

        sheet.attempt(fail, asked=1)
        sheet.attempt(lambda: {"value": 2}, asked=2)
        assert sheet.rows[0] == {"asked": 1, "error": "ValueError: no"}
        assert (sheet.rows[1]["asked"], sheet.rows[1]["value"]) == (2, 2)

    def test_after_three_failures_or_the_deadline_nothing_is_tried(self, tmp_path: Path) -> None:
        late = Sheet(tmp_path / "late.json", {}, deadline=0.0)
        late.attempt(lambda: {"value": 1}, asked=1)
        assert "out of time" in late.rows[0]["error"]
        broken = Sheet(tmp_path / "broken.json", {})
        for _ in range(4):
            broken.attempt(lambda: {}[0], asked=1)
        assert ["KeyError" in row["error"] for row in broken.rows] == [True, True, True, False]


@pytest.mark.parametrize("task", ["fast-dllm-v2", "sdar-8", "converted"])
def test_a_shape_task_writes_every_row(task: str, tmp_path: Path) -> None:
    run_shape(task, small(), tmp_path / f"{task}.json", NEVER)
    results = Results.read(tmp_path)
    assert results.failed == []
    assert results.sheets[0]["finished"]
    modes = {row["mode"] for row in results.find("curve")}
    assert modes == {row["mode"] for row in results.find("forward")}
    for mode in modes - {"autoregressive"}:
        assert [row["wanted"] for row in results.find("curve", mode=mode)] == [1, 4]
        assert [row["asked"] for row in results.find("forward", mode=mode)] == [1, 3]
    assert [row["asked"] for row in results.find("prefill")] == [2]
    assert {row["mode"] for row in results.find("profile")} == modes
    for row in results.find("profile"):
        assert row["kernels"][0][1] >= row["kernels"][1][1] > 0
        assert sum(kernel[1] for kernel in row["kernels"]) == pytest.approx(row["busy_ms"], rel=1e-3)
    assert all(row["floor_ms"] > 0 and row["step_ms"] > 0 for row in results.find("forward"))


def test_contexts_that_do_not_fit_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(variant: Variant, settings: Settings) -> EngineCore:
        core = real(variant, settings)
        # Two contexts of 64, and the room behind them.
        core.scheduler.holdings.pool = core.scheduler.prefix.pool = PagePool(1 + 2 * (64 + 320) // core.info.page_size)
        return core

    real = shape_task._load
    monkeypatch.setattr(shape_task, "_load", load)
    run_shape("sdar-4", small(parts=("forwards",)), tmp_path / "sdar-4.json", NEVER)
    assert [(row["asked"], row["sequences"]) for row in Results.read(tmp_path).find("forward")] == [(1, 1), (3, 2)]


class TestModelTasks:
    @pytest.fixture
    def settings(self, model: Path, tmp_path: Path) -> Settings:
        (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"turns": ["two", "more"]}\n')
        return small(model=str(model), prompts=tmp_path / "p.jsonl", clients=(1, 3))

    def test_offline(self, settings: Settings, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        run_offline(settings, tmp_path / "out" / "embedded.json", NEVER)
        results = Results.read(tmp_path / "out")
        assert results.failed == []
        rows = results.find("clients", mode="threshold 0.7")
        assert [(row["asked"], row["requests"], row["tokens"]) for row in rows] == [(1, 2, 16), (3, 6, 48)]
        shared = json.loads((tmp_path / "out" / PROMPTS).read_text())
        assert (len(shared["ids"]), shared["tokens"]) == (2, 8)

    def test_http(self, settings: Settings, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        run_http(settings, tmp_path / "out" / "http.json", NEVER)
        results = Results.read(tmp_path / "out")
        assert results.failed == []
        rows = results.find("http", mode="threshold 0.7")
        assert [(row["asked"], row["requests"], row["tokens"]) for row in rows] == [(1, 2, 16), (3, 6, 48)]


class TestStreams:
    def body(self, server: Served) -> dict[str, Any]:
        name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        messages = [{"role": "user", "content": "hi"}]
        return {"model": name, "messages": messages, "temperature": 0, "max_tokens": 12}

    def test_clients_of_several_processes_share_the_requests(self, server: Served) -> None:
        found = run_streams(server.url, [self.body(server)], 40, 45)
        assert (found.processes, found.requests, found.tokens) == (2, 45, 45 * 12)
        assert 0 < found.first_token_s < found.seconds
        assert found.tokens_per_second == pytest.approx(540 / found.seconds)

    def test_a_refusal_is_an_error_with_its_reason(self, server: Served) -> None:
        with pytest.raises(RuntimeError, match=r"400 Bad Request: .*max_tokens"):
            run_streams(server.url, [{**self.body(server), "max_tokens": 0}], 1, 1)


def test_the_command_runs_tasks_in_processes_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.performance", "run", str(tmp_path), "--tiny", "--quick"]
    command += ["--device", "cpu", "--tasks", "sdar-4", "--only", "prefill"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["point"] for row in read_sheets(tmp_path)[0]["rows"]] == ["prefill", "prefill"]


@pytest.mark.parametrize("wrong", [["--tasks", "sdar-5"], ["--only", "all"], ["--tasks", "http"]])
def test_names_that_mean_nothing_are_refused(wrong: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.performance", "run", str(tmp_path), *wrong]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert wrong[1] in done.stderr


class FakeLLM:
    """As much of vLLM as the peer uses: every prompt's tokens come one a step."""

    def __init__(self, **options: Any) -> None:
        self.options, self.llm_engine = options, self
        self.left: dict[str, Any] = {}
        self.most = 0

    def add_request(self, name: str, prompt: list[int], params: Any) -> None:
        self.left[name] = [params.max_tokens, params]
        self.most = max(self.most, len(self.left))

    def step(self) -> list[Any]:
        outputs = []
        for name, entry in list(self.left.items()):
            entry[0] -= 1
            whole = entry[1].output_kind == "whole"
            if entry[0] and whole:
                continue
            ids = [7] * entry[1].max_tokens if whole else [7]
            outputs.append(
                SimpleNamespace(request_id=name, finished=not entry[0], outputs=[SimpleNamespace(token_ids=ids)])
            )
            if not entry[0]:
                del self.left[name]
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta", FINAL_ONLY="whole"))
    module = SimpleNamespace(__version__="9", LLM=FakeLLM, SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    monkeypatch.setitem(sys.modules, "vllm.inputs", SimpleNamespace(tokens_input=list))


def test_the_peer_answers_the_same_prompts(fake_vllm: None, tmp_path: Path) -> None:
    peer = vllm_peer.Peer(tmp_path, True, 4)
    assert peer._llm.options["load_format"] == "dummy"
    found = peer.run([[1], [2]], 3, 7, 5, True)
    assert (found["tokens"], found["requests"], peer._llm.most) == (35, 7, 3)
    assert peer.run([[1]], 2, 2, 5, False, stream=False)["tokens"] == 10
    sheet = Sheet(tmp_path / "vllm-x.json", {"task": "smollm2-135m", "engine": "vLLM 9"})
    vllm_peer.measure(peer, sheet, [1, 4], [2], {"ids": [[1]], "tokens": 8})
    assert [(row["point"], row["asked"]) for row in sheet.rows] == [
        ("prefill", 1), ("prefill", 64), ("decode", 1), ("decode", 4), ("clients", 2),
    ]  # fmt: skip
    assert not any("error" in row for row in sheet.rows)
    assert sheet.rows[-1]["tokens"] == 6 * 8
