"""The evaluate stage on the CPU: tiny golden checkpoints as the original and as its conversions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import write_tokenizer

from linocut.engine.errors import ConfigError
from linocut.engine.llm import LLM
from linocut.training import evaluate_runs
from linocut.training.evaluate import encode, evaluate, rescore
from linocut.training.evaluate_runs import Answered, Run, RunFile
from linocut.training.evaluate_settings import ORIGINAL, OWN, Setting, complete, default_settings, parse
from linocut.training.evaluate_table import make_row, markdown
from linocut.training.judge import Judge, Verdict
from linocut.training.plots import plot_speed_quality, plot_training, read_log, series, thin

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Golden checkpoints with a tokenizer of their vocabulary, and two files of prompts."""
    root = tmp_path_factory.mktemp("models")
    golden = Path(__file__).parents[1] / "golden"
    found = {}
    for name, source in (("original", "jacobi_qwen2"), ("blocks", "sdar"), ("causal", "jacobi_qwen2")):
        found[name] = root / name
        shutil.copytree(golden / source, found[name], ignore=shutil.ignore_patterns("golden*", "README*"))
        write_tokenizer(found[name])
    path = found["causal"] / "config.json"
    traits = {"context": "token-causal", "logit_source": "previous", "block_size": 4, "mask_token_id": 311}
    path.write_text(json.dumps({**json.loads(path.read_text()), "linocut": {**traits, "banned_ids": [311]}}))
    sums = [{"input": f"What is {i} and {i} ?", "target": 2.0 * i, "idx": i} for i in range(12)]
    (root / "mawps.jsonl").write_text("\n".join(map(json.dumps, sums)))
    chats = [{"instruction": f"Say hello {'very ' * i}loud."} for i in range(5)]
    (root / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return {**found, "mawps": root / "mawps.jsonl", "chat": root / "chat.jsonl"}


SETTINGS = ["static,block_size=4", "threshold,block_size=8,threshold=0.2", "threshold,block_size=4,threshold=0.9"]


@pytest.fixture(scope="module")
def evaluated(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One evaluation, and where it was written."""
    out = tmp_path_factory.mktemp("out")
    result = evaluate(
        folders["blocks"],
        folders["original"],
        [folders["mawps"], folders["chat"]],
        out=out,
        max_tokens=12,
        settings=[*SETTINGS, "verify,draft_length=4", "threshold,threshold=7", "original/jacobi"],
        limit=4,
        task_limit=7,
        report=lambda _: None,
        **CPU,
    )
    return result, out


def row(result: dict[str, Any], label: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["label"] == label)


def test_negative_log_likelihoods_are_those_of_one_pass_each(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    judge = Judge(folders["original"], torch.device("cpu"))
    pairs = [((5, 6, 7), (8, 9)), ((11,), (12, 13, 14, 15, 41)), ((20, 21), ()), ((5, 6, 7), (8, 9))]
    verdicts = judge.verdicts(pairs)
    model = AutoModelForCausalLM.from_pretrained(folders["original"], dtype=torch.float32).eval()
    for (prompt, answer), verdict in zip(pairs, verdicts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        rows = logits[len(prompt) - 1 : -1] if answer else logits[:0]
        wanted = torch.nn.functional.cross_entropy(rows, torch.tensor(answer).long(), reduction="sum")
        assert verdict.nll == pytest.approx(float(wanted), abs=1e-4)
        assert verdict.agreed == int((rows.argmax(1) == torch.tensor(answer).long()).sum())


def test_the_originals_own_text_is_its_argmax(evaluated: tuple[dict[str, Any], Path]) -> None:
    original = row(evaluated[0], ORIGINAL.label)
    assert original["agreement"] == 1.0
    assert original["tokens_per_forward"] == 1.0
    assert original["same_as_original"] == 1.0
    assert original["same_as_own"] is None
    assert row(evaluated[0], "original/jacobi")["same_as_original"] == 1.0


def test_forwards_and_tokens_are_the_engines(evaluated: tuple[dict[str, Any], Path], folders: dict[str, Path]) -> None:
    result, _ = evaluated
    llm = LLM(str(folders["blocks"]), **CPU, block_size=4, max_model_len=256, prefix_caching=False)
    records = {json.loads(line)["idx"]: json.loads(line) for line in folders["mawps"].read_text().splitlines()}
    prompts = [records[int(i.split(":")[1])]["input"] for i in result["prompts"]["mawps"]["ids"]]
    prompts = [encode(llm.tokenizer, text) for text in prompts]
    answers = llm.generate(prompts, max_tokens=12, temperature=0.0, diffusion={"strategy": "static"})
    found = row(result, "converted/static,block_size=4")["files"]["mawps"]
    assert found["tokens"] == sum(len(a.token_ids) for (a,) in answers)
    assert found["forwards"] == sum(a.forwards for (a,) in answers)
    assert found["count"] == 4


def test_what_a_folder_does_not_support_is_skipped_and_named(evaluated: tuple[dict[str, Any], Path]) -> None:
    result, _ = evaluated
    labels = {row["label"] for row in result["rows"]}
    assert labels == {ORIGINAL.label, "original/jacobi", *(f"converted/{name}" for name in SETTINGS)}
    skipped = {line.split(" ")[0] for line in result["skipped"]}
    assert skipped == {OWN.label, "converted/verify,draft_length=4", "converted/threshold,threshold=7"}
    assert row(result, "converted/static,block_size=4")["same_as_own"] is None


def test_a_block_size_that_a_folder_cannot_have_is_skipped(folders: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path, "max_tokens": 2, "limit": 1, "report": lambda _: None, **CPU}
    result = evaluate(folders["original"], folders["original"], [folders["chat"]], settings=SETTINGS[:1], **options)
    assert [line.split(" ")[0] for line in result["skipped"]] == ["converted/static,block_size=4"]
    assert row(result, OWN.label)["same_as_own"] == row(result, OWN.label)["same_as_original"] == 1.0


def test_verified_drafts_write_the_autoregressive_text(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = ["verify,draft_length=2,row_cost=0", "threshold,block_size=2", "static,block_size=8"]
    options: dict[str, Any] = {"out": tmp_path, "max_tokens": 8, "limit": 2, "report": lambda _: None, **CPU}
    result = evaluate(folders["causal"], folders["original"], [folders["chat"]], settings=settings, **options)
    assert result["skipped"] == []
    assert [row["label"] for row in result["rows"]] == [
        ORIGINAL.label,
        OWN.label,
        *(f"converted/{s}" for s in settings),
    ]
    verified = row(result, f"converted/{settings[0]}")
    assert verified["same_as_own"] == 1.0
    assert verified["tokens_per_forward"] >= 0.9
    assert row(result, "converted/static,block_size=8")["block_size"] == 8


def test_more_prompts_are_scored_than_the_table_has(evaluated: tuple[dict[str, Any], Path]) -> None:
    result, _ = evaluated
    assert [entry["count"] for entry in result["prompts"].values()] == [4, 4]
    assert len(result["prompts"]["mawps"]["more_ids"]) == 3
    assert all(row["scores"]["mawps"]["count"] == 7 for row in result["rows"])
    assert all(row["count"] == 8 for row in result["rows"])


def test_the_table_keeps_its_prompts_when_more_are_scored(
    evaluated: tuple[dict[str, Any], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"out": tmp_path, "max_tokens": 12, "limit": 4, "report": lambda _: None, **CPU}
    fewer = evaluate(folders["original"], folders["original"], [folders["mawps"]], settings=[], **options)
    assert fewer["prompts"]["mawps"]["ids"] == evaluated[0]["prompts"]["mawps"]["ids"]
    wanted = row(evaluated[0], ORIGINAL.label)["files"]["mawps"]
    assert row(fewer, ORIGINAL.label)["nll"] == pytest.approx(wanted["nll"], abs=1e-5)


def test_everything_is_written_and_can_be_read_again(evaluated: tuple[dict[str, Any], Path]) -> None:
    result, out = evaluated
    assert json.loads((out / "evaluation.json").read_text()) == result
    table = (out / "evaluation.md").read_text()
    assert table == markdown(result)
    assert table.count("\n| ") == len(result["rows"])
    assert "mawps (7)" in table.splitlines()[0]
    assert (out / "speed_quality.svg").is_file()


def test_a_stopped_run_goes_on_from_its_answers(
    evaluated: tuple[dict[str, Any], Path], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, out = evaluated
    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:-1]) + lines[-1][:50])
    said: list[str] = []
    again = evaluate(
        folders["blocks"],
        folders["original"],
        [folders["mawps"], folders["chat"]],
        out=tmp_path,
        max_tokens=12,
        settings=[*SETTINGS, "original/jacobi"],
        limit=4,
        task_limit=7,
        report=said.append,
        **CPU,
    )
    assert len([line for line in said if line.endswith("answered")]) == 1
    for found in again["rows"]:
        wanted = row(result, found["label"])
        assert {**found, "seconds": 0, "tokens_per_second": 0} == {**wanted, "seconds": 0, "tokens_per_second": 0}


def test_answers_survive_a_start_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RunFile(tmp_path / "answers.jsonl", "mark")
    for setting in ("one", "two"):
        file.add(Run(setting, 4, 1.0, [Answered("p", [1, 2], "text", 2, "stop")], []))
    RunFile(tmp_path / "answers.jsonl", "another").add(Run("three", 4, 1.0, [], []))
    written: list[dict[str, Any]] = []

    def dump(value: Any, **options: Any) -> str:
        written.append(value)
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(value, **options)

    with monkeypatch.context() as patch:
        real = json.dumps
        patch.setattr(evaluate_runs.json, "dumps", dump)
        with pytest.raises(KeyboardInterrupt):
            file.start()
    assert set(file.read()) == {"one", "two"}
    file.start()
    assert set(file.read()) == {"one", "two"}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_scores_can_be_made_again_elsewhere(
    evaluated: tuple[dict[str, Any], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    result, out = evaluated
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    stale = json.loads((out / "evaluation.json").read_text())
    for entry in stale["rows"]:
        entry["scores"] = {}
    (tmp_path / "evaluation.json").write_text(json.dumps(stale))
    assert rescore(tmp_path, [folders["mawps"], folders["chat"]]) == result
    with pytest.raises(ConfigError, match="lack"):
        rescore(tmp_path, [folders["chat"]])
    with pytest.raises(ConfigError, match="no evaluation"):
        rescore(tmp_path / "nowhere", [folders["chat"]])


def test_settings_are_what_their_labels_say() -> None:
    for setting in default_settings():
        assert parse(setting.label) == setting
        assert parse(setting.label).parameters == setting.parameters
    labels = [setting.label for setting in default_settings()]
    assert len(set(labels)) == len(labels)
    found = parse("threshold,block_size=8,threshold=0.7,sub_block_cache=true,order=sequential")
    options = {"threshold": 0.7, "sub_block_cache": True, "order": "sequential"}
    assert (found.block_size, found.parameters) == (8, options)
    assert [setting.label for setting in complete(["verify", "verify"])] == [
        ORIGINAL.label,
        OWN.label,
        "converted/verify",
    ]


@pytest.mark.parametrize("text", ["", "other/verify", "verify,fast", "threshold,block_size=big", "static,block_size=0"])
def test_a_setting_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="setting"):
        parse(text)


def test_a_row_worked_out_by_hand() -> None:
    def run(setting: Setting, *answers: list[int]) -> Run:
        made = [
            Answered(f"f{i}:0", tokens, "", 2, "stop" if 2 in tokens else "length") for i, tokens in enumerate(answers)
        ]
        return Run(setting.label, 4, 2.0, made, [])

    setting = parse("threshold,block_size=4")
    runs = {
        ORIGINAL.label: run(ORIGINAL, [5, 6, 7], [8, 9, 2]),
        OWN.label: run(OWN, [5, 6, 7], [8, 2]),
        setting.label: run(setting, [5, 6, 7], [8, 2]),
    }
    made = make_row(setting, runs[setting.label], [Verdict(1.5, 3), Verdict(1.0, 1)], runs, {})
    assert (made["tokens"], made["forwards"], made["tokens_per_forward"]) == (5, 4, 1.25)
    assert (made["nll"], made["agreement"], made["ended"]) == (0.5, 0.8, 0.5)
    assert (made["same_as_original"], made["same_as_own"], made["tokens_per_second"]) == (0.5, 1.0, 2.5)
    assert made["files"]["f0"]["nll"] == 0.5


def test_the_curve_is_drawn(evaluated: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    plot_speed_quality(evaluated[0], tmp_path / "a.svg")
    plot_speed_quality(evaluated[0], tmp_path / "b.svg")
    plot_speed_quality(evaluated[0], tmp_path / "c.png")
    text = (tmp_path / "a.svg").read_text()
    assert "threshold, block 8" in text
    assert "autoregressive, original weights" in text
    assert text == (tmp_path / "b.svg").read_text()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 60_000
    with pytest.raises(ConfigError, match="pdf"):
        plot_speed_quality(evaluated[0], tmp_path / "a.pdf")


def test_training_is_drawn_from_a_log_that_was_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    entries: list[dict[str, Any]] = [{"kind": "start", "model": "x"}]
    for i in range(1, 1001):
        entry = {
            "step": i,
            "tokens": i * 1000,
            "loss": 9 / i,
            "lr": 1e-3,
            "draft_accuracy": [0.5, 0.4],
            "draft_ce": 1.0,
        }
        entries.append({"kind": "train", **entry})
    entries.append({"kind": "held-out", "tokens": 500_000, "draft_ce": float("nan"), "denoise_accuracy": [0.6]})
    log.write_text("\n".join(map(json.dumps, entries)) + '\n{"kind": "tra')
    found = series(read_log(log))
    assert found["loss"][0][-1] == 1.0
    assert found["draft_accuracy 2"][1][0] == 0.4
    assert series(read_log(log), "held-out")["denoise_accuracy 1"] == ([0.5], [0.6])
    plot_training(log, tmp_path / "plots" / "training.svg")
    text = (tmp_path / "plots" / "training.svg").read_text()
    assert "draft accuracy by offset" in text
    assert "denoise accuracy by offset, held-out" in text
    assert len(text) < 80_000
    plot_training(log, tmp_path / "training.png")
    log.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="no losses"):
        plot_training(log, tmp_path / "training.png")


def test_curves_are_thinned_by_means() -> None:
    assert thin([1, 2, 3, 4, 5], [1, 3, 5, 7, 9], points=3) == ([1.5, 3.5, 5], [2, 6, 9])
    assert thin([], []) == ([], [])


def test_whether_code_runs_is_said_by_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="true or false"):
        rescore(tmp_path, [], execute_code="no")  # type: ignore[arg-type]
