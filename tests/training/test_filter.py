"""Training a filter: what is collected, what is learnt of it, and that the engine serves the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import write_tiny_checkpoint
from typer.testing import CliRunner

from linocut.engine.decoding.filter import FILE, Filter, read_filter
from linocut.engine.errors import ConfigError
from linocut.engine.llm import LLM
from linocut.server.cli import app
from linocut.training.filter import LOG, fit, measure, train_filter
from linocut.training.filter_records import Records, collect, joined
from linocut.training.filter_settings import FilterSettings
from linocut.training.prompts import PromptFile

MASK = 4
ENGINE = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 4 << 20}


def block_model(folder: Path, context: str, source: str) -> Path:
    """A tiny model that decodes blocks of 4; what it says there is as random as its weights."""
    write_tiny_checkpoint(folder, layers=1)
    config = json.loads((folder / "config.json").read_text())
    config["linocut"] = {"context": context, "logit_source": source, "block_size": 4, "mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_model(tmp_path_factory.mktemp("own"), "block-causal", "own")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}, and {7 * i}."}) + "\n" for i in range(12)))
    return path


def settings(model: Path, out: Path, file: Path, **more: Any) -> FilterSettings:
    fixed = {"model": model, "out": out, "prompts": (PromptFile(file),), "engine": ENGINE}
    return FilterSettings(**fixed | {"max_tokens": 16, "steps": 40} | more)


@pytest.mark.parametrize(
    ("context", "source"),
    [("block-causal", "own"), ("block-causal", "previous"), ("token-causal", "own"), ("token-causal", "previous")],
)
def test_the_oracle_writes_the_reference_and_notes_what_was_right(context: str, source: str, tmp_path: Path) -> None:
    llm = LLM(str(block_model(tmp_path / "model", context, source)), prefix_caching=False, **ENGINE)
    ids = [[10 + n, 20, 30 + n] for n in range(6)]
    options: dict[str, Any] = {"max_tokens": 18, "temperature": 0.0}
    static = [answer for (answer,) in llm.generate(ids, diffusion={"strategy": "static"}, **options)]
    records = collect(llm, ids, [answer.token_ids for answer in static])
    assert len(records.prompt.unique()) > 3
    assert not bool((records.right & ~records.counts).any()), "right is what counts and equals the reference"
    assert 0 < int(records.right.sum()) < int(records.counts.sum())
    assert float(records.confidence.max()) <= 1.0
    assert float(records.confidence.min()) >= 0.0
    assert bool((records.confidence > 0)[records.counts].all()), "each proposal has a probability"


def test_collecting_leaves_the_engine_as_it_was(model: Path) -> None:
    llm = LLM(str(model), prefix_caching=False, **ENGINE)
    strategy = llm.core.runner.strategies["learned"]  # type: ignore[union-attr]
    options: dict[str, Any] = {"max_tokens": 9, "temperature": 0.0, "diffusion": {"strategy": "static"}}
    before = llm.generate([[9, 10]], **options)[0][0].token_ids
    collect(llm, [[9, 10]], [before])
    assert llm.core.runner.strategies["learned"] is strategy  # type: ignore[union-attr]
    assert llm.generate([[9, 10]], **options)[0][0].token_ids == before


def test_blocks_of_several_lengths_are_padded() -> None:
    def some(width: int) -> Records:
        ones = torch.ones(2, width)
        return Records(ones, ones.bool(), ones.bool(), torch.zeros(2).long())

    both = joined([some(2), some(4)])
    assert both.confidence.tolist() == [[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 2
    assert both.counts[:2, 2:].sum() == 0


def records_of(rule: Any, count: int = 3000) -> Records:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(count, 4, generator=generator)
    counts = torch.rand(count, 4, generator=generator) < 0.7
    return Records(confidence, rule(confidence) & counts, counts, torch.arange(count) // 10)


def test_it_learns_what_one_threshold_cannot_say() -> None:
    """Right where a position is sure and its left neighbour is, too."""
    records = records_of(lambda c: (c > 0.5) & (torch.cat([c[:, :1], c[:, :-1]], 1) > 0.5))
    noted: list[dict[str, Any]] = []
    options = FilterSettings(Path(), Path(), (PromptFile(Path()),), steps=1500, threshold=0.9)
    found, last = fit(records, options, noted.append)
    assert last["precision"] > 0.98
    # The first positions, where one would do, are two fifths of those that are right.
    assert last["recall"] > 0.55
    assert noted[-1] == last
    assert noted[0]["held_out_loss"] > 3 * last["held_out_loss"]
    assert (found.length, found.w1.shape[0]) == (4, 32)


def test_what_does_not_count_teaches_nothing() -> None:
    records = records_of(lambda c: c > 0.5, count=200)
    options = FilterSettings(Path(), Path(), (PromptFile(Path()),), steps=30)
    lied = replace(records, right=records.right | ~records.counts)
    found = [fit(some, options, lambda record: None)[0].w1 for some in (records, lied)]
    assert torch.equal(*found)


def test_precision_and_recall() -> None:
    one = torch.eye(4)
    known = Filter(one * 20, torch.zeros(4), one, torch.full((4,), -10.0))  # above one half where confidence is
    records = Records(
        torch.tensor([[0.9, 0.8, 0.2, 0.9]]),
        torch.tensor([[True, False, True, True]]),
        torch.tensor([[True, True, True, False]]),
        torch.zeros(1).long(),
    )
    assert measure(known, records, 0.5) == {"precision": 0.5, "recall": 0.5, "share": 0.6667}
    assert measure(known, records, 1.0) == {"precision": None, "recall": 0.0, "share": 0.6667}


def test_the_command_writes_a_filter_that_the_engine_serves(model: Path, prompts: Path) -> None:
    words = ["convert", "filter", model, model, "--prompts", prompts, "--max-tokens", 16, "--limit", 10]
    words += ["--set", "steps=40", "--set", f"engine={json.dumps(ENGINE)}", "--block-size", 4, "--block-size", 8]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    try:
        found = read_filter(model, torch.device("cpu"))
        assert found is not None
        assert found.length == 8
        log = [json.loads(line) for line in (model / LOG).read_text().splitlines()]
        assert [record["kind"] for record in log][:2] == ["collected", "collected"]
        assert [record["block_length"] for record in log[:2]] == [4, 8]
        assert log[-1]["kind"] == "end"
        assert {"precision", "recall", "held_out_loss", "seconds"} <= log[-1].keys()
        llm = LLM(str(model), **ENGINE)
        ((answer,),) = llm.generate([[9, 10]], max_tokens=8, diffusion={"strategy": "learned"})
        assert len(answer.token_ids) > 0
    finally:
        (model / FILE).unlink(missing_ok=True)


def test_the_same_settings_make_the_same_filter(model: Path, prompts: Path, tmp_path: Path) -> None:
    made = [load_file(train_filter(settings(model, tmp_path / out, prompts), lambda text: None)) for out in "ab"]
    assert made[0].keys() == made[1].keys() == {"w1", "b1", "w2", "b2"}
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_model_without_blocks_has_no_filter(tmp_path: Path, prompts: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", layers=1)
    with pytest.raises(ConfigError, match="no filter can be trained"):
        train_filter(settings(plain, tmp_path / "out", prompts, diffusion={"strategy": "autoregressive"}))


@pytest.mark.parametrize("wrong", [{"held_out": 0}, {"block_sizes": (1,)}, {"steps": 0}, {"prompts": ()}])
def test_options_out_of_bounds_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settings(tmp_path, tmp_path, tmp_path, **wrong)
