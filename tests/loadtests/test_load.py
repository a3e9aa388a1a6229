"""The load test's scenarios, what it makes of samples, its tables, and the shape that it serves."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from linocut.server.tokenizer import load_tokenizer
from loadtests.report import BEGIN, END, cells, draw, put_into, sections
from loadtests.samples import Sample, summarize, within
from loadtests.scenarios import SCENARIOS, WORDS
from loadtests.serving import Served, served
from loadtests.shape_model import write_shape_model

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
SHAPE = "fast-dllm-v2-7b"


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape_model(SHAPE, tmp_path_factory.mktemp("shape"), tiny=True)


@pytest.fixture(scope="module")
def server(shape: Path) -> Iterator[Served]:
    options = ("--random-weights", "--dtype", "float32", "--max-model-len", "1024", "--kv-memory", "8M")
    with served(None, str(shape), *options, "--log-level", "error") as running:
        yield running


class TestSamples:
    @pytest.mark.parametrize(
        ("sample", "share"),
        [
            (Sample(1.0, 0.5, 3.0, 10), 1.0),
            (Sample(8.0, 1.0, 5.0, 10), 0.25),  # text from 9 to 13
            (Sample(8.0, 3.0, 5.0, 10), 0.0),  # queued until 11
            (Sample(9.5, 1.0, 1.0, 1), 0.0),  # all at once, too late
            (Sample(9.0, None, 0.5, 0), 1.0),
        ],
    )
    def test_what_comes_after_the_clients_have_left_does_not_count(self, sample: Sample, share: float) -> None:
        assert within(sample, 10.0) == pytest.approx(share)

    def test_a_row_counts_whole_answers_and_names_the_others(self) -> None:
        samples = [
            Sample(0.0, 1.0, 3.0, 21),
            Sample(8.0, 1.0, 5.0, 40),
            Sample(1.0, 0.5, 0.9, 9, hung_up=True),
            Sample(1.0, None, 0.1, 0, error="503"),
        ]
        row = summarize(SCENARIOS[0], 4, samples, 10.0)
        assert (row["requests"], row["failed"], row["hung_up"]) == (4, 1, 1)
        assert (row["requests_per_second"], row["tokens_per_second"]) == (0.12, 3.1)
        assert row["first_p50"] == 1.0
        assert row["seconds_p50"] == 4.0
        assert row["token_p50"] == pytest.approx((2000 / 20 + 4000 / 39) / 2, abs=1e-3)

    def test_where_nobody_was_answered_there_is_no_latency(self) -> None:
        row = summarize(SCENARIOS[0], 1, [Sample(0.0, None, 0.1, 0, error="refused")], 5.0)
        assert row["first_p50"] is None
        assert cells(row)[-1] == ""


class TestReport:
    def found(self) -> dict[str, object]:
        about = {"device": "Card", "versions": {"torch": "9"}, "options": ["--a", "1"]}
        rows = [
            {**summarize(one, one.levels[0], [Sample(0.0, 0.5, 1.0, 3)], 2.0), "client_busy": 0.5} for one in SCENARIOS
        ]
        return {"title": "A title", "seconds": 2.0, "about": about, "rows": rows}

    def test_a_section_has_a_row_for_every_level_and_says_where_it_was(self, tmp_path: Path) -> None:
        (tmp_path / "load").mkdir()
        path = tmp_path / "load" / "cpu.json"
        path.write_text(json.dumps(self.found()))
        text = sections([path], tmp_path / "doc.md")
        assert "### A title" in text
        assert "Card, torch 9. Options of the server: `--a 1`." in text
        assert "](load/cpu.svg)" in text
        assert "| poisson | 0.5/s | 1 | 0 | 0 | 0.5 | 1.5 | 0.5 | 0.5 | 250.0 | 250.0 | 1.0 | 1.0 |" in text
        assert "at most 50% of a core" in text
        assert sum(line.startswith(f"| {one.name} |") for one in SCENARIOS for line in text.splitlines()) == 7

    def test_a_document_keeps_what_is_around_its_tables(self) -> None:
        document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
        assert put_into(document, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
        with pytest.raises(ValueError, match="no lines"):
            put_into("before", "new")

    def test_the_same_rows_draw_the_same_picture(self, tmp_path: Path) -> None:
        for name in ("a.svg", "b.svg"):
            draw(self.found()["rows"], tmp_path / name, "title")  # type: ignore[arg-type]
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        assert "shared prefix" in (tmp_path / "a.svg").read_text()

    def test_the_document_shows_the_results_beside_it(self) -> None:
        files = sorted((DOCUMENT.parent / "load").glob("*.json"))
        document = DOCUMENT.read_text(encoding="utf-8")
        assert put_into(document, sections(files, DOCUMENT)) == document
        for path in files:
            assert path.with_suffix(".svg").is_file()


class TestShape:
    def test_every_id_of_the_vocabulary_is_some_text(self, shape: Path) -> None:
        config = json.loads((shape / "config.json").read_text())
        tokenizer = load_tokenizer(shape)
        assert tokenizer is not None
        texts = tokenizer.token_strings(range(config["vocab_size"]))
        assert len(texts) == len(set(texts)) == config["vocab_size"]
        assert texts[config["eos_token_id"]] == "<|end|>"
        assert texts[config["mask_token_id"]] == "<|mask|>"

    def test_a_word_of_a_prompt_is_a_token(self, shape: Path) -> None:
        tokenizer = load_tokenizer(shape)
        assert tokenizer is not None
        text = " " + " ".join(WORDS)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(WORDS)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_it_is_served_with_random_weights_as_any_model(self, server: Served) -> None:
        body = SCENARIOS[0].body(random.Random(0), SHAPE, [])
        with httpx.Client(base_url=server.url, timeout=60) as client:
            info = client.get("/server_info").json()
            body["model"] = client.get("/v1/models").json()["data"][0]["id"]
            text = client.post("/v1/completions", json=body).text
            chat = {"model": body["model"], "messages": [{"role": "user", "content": "time"}], "max_tokens": 4}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
        assert info["engine"]["random_weights"]
        assert info["model"]["device_name"]
        assert '"completion_tokens":48' in text.replace(" ", "")


def test_without_weights_a_folder_is_served_only_if_that_is_asked_for(shape: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no \.safetensors"):
        served(None, str(shape), "--dtype", "float32").__enter__()


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="needs locust")
def test_the_command_writes_every_level_and_its_server(server: Served, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.load", "--url", server.url, "--seconds", "0.5", "--levels", "2"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png"), "--title", "here"]
    done = subprocess.run([*command, *files], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["scenario"] for row in found["rows"]] == [one.name for one in SCENARIOS]
    assert all(row["requests"] >= 1 and row["failed"] == 0 for row in found["rows"])
    assert (tmp_path / "a.png").stat().st_size > 1000
