"""`linocut convert`: what stands on the command line reaches the stages, and `run` skips what is complete."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_tiny_checkpoint
from typer.testing import CliRunner

from linocut.engine.errors import ConfigError
from linocut.server import convert
from linocut.server.cli import app
from linocut.server.convert_options import options_from, split_stages
from linocut.training import adapt, evaluate
from linocut.training import generate as generating
from linocut.training import polish as polishing
from linocut.training.answers import read_answers
from linocut.training.generate_settings import GenerateSettings
from linocut.training.polish_settings import PolishSettings
from linocut.training.settings import AdaptSettings

SMALL = [
    "--set",
    'engine={"device":"cpu","dtype":"float32","threads":1,"kv_memory":4194304}',
    "--set",
    "progress=false",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), layers=1)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Adapt and evaluate as stubs that leave behind what the stages do."""
    calls: list[tuple[str, Any]] = []

    def fake_adapt(settings: AdaptSettings) -> Path:
        calls.append(("adapt", settings))
        for folder in (settings.run, settings.output):
            Path(folder).mkdir(parents=True, exist_ok=True)
        finished = settings.max_seconds != 1.0
        (Path(settings.run) / "log.jsonl").write_text(json.dumps({"kind": "end", "finished": finished}) + "\n")
        (Path(settings.output) / "config.json").write_text("{}")
        return Path(settings.output)

    def fake_evaluate(folder: Path, original: Path, files: list[Path], *, out: Path, **options: Any) -> None:
        del options["report"]
        calls.append(("evaluate", (folder, original, files, options)))
        out.mkdir(exist_ok=True)
        (out / "evaluation.json").write_text("{}")

    def fake_polish(settings: PolishSettings) -> None:
        calls.append(("polish", settings))
        Path(settings.output).mkdir()
        (Path(settings.output) / "config.json").write_text("{}")

    monkeypatch.setattr(polishing, "polish", fake_polish)
    monkeypatch.setattr(adapt, "adapt", fake_adapt)
    monkeypatch.setattr(evaluate, "evaluate", fake_evaluate)
    return calls


def run(*words: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def test_generate_writes_answers_and_prints_its_summary(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    text = run("generate", model, out, "--prompts", prompts, "--max-tokens", 12, "--set", "truncated_share=1", *SMALL)
    summary = json.loads(text.splitlines()[-1])
    assert summary["answers"] == len(read_answers(out)) > 0
    assert summary["ended"] == "prompts"


def test_run_makes_every_stage_once(model: Path, prompts: Path, tmp_path: Path, stages: list[tuple[str, Any]]) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"prompt": "Say 3."}\n')
    words: list[Any] = ["run", model, tmp_path / "all", "--prompts", prompts, "--evaluate-on", held_out]
    for text in (SMALL[1], "max_tokens=12", "truncated_share=1", "progress=false"):
        words += ["--set", f"generate.{text}"]
    words += ["--set", "adapt.rank=4", "--set", "adapt.segments=[2,4]", "--set", "evaluate.limit=5"]
    first = run(*words)
    assert [name for name, _ in stages] == ["adapt", "evaluate"]
    settings: AdaptSettings = stages[0][1]
    assert (settings.rank, settings.segments, settings.max_seconds) == (4, [2, 4], 1200.0)
    assert (settings.base, settings.data) == (str(model), [str(tmp_path / "all" / "answers")])
    assert stages[1][1] == (tmp_path / "all" / "adapted", model, [held_out], {"limit": 5})
    summary = json.loads((tmp_path / "all" / "answers" / "generate.json").read_text())
    assert summary["counts"]["prompts excluded"] == 1, "what evaluates is not trained on"
    assert "linocut serve" in first
    again = run(*words)
    assert len(stages) == 2
    assert again.count("complete") == 3


def test_run_goes_on_with_an_unfinished_stage(
    model: Path, prompts: Path, tmp_path: Path, stages: list[tuple[str, Any]]
) -> None:
    words: list[Any] = ["run", model, tmp_path / "all", "--prompts", prompts]
    for text in (SMALL[1], "max_tokens=12", "truncated_share=1", "progress=false"):
        words += ["--set", f"generate.{text}"]
    with pytest.raises(ConfigError, match="go on"):
        run(*words, "--adapt-seconds", 1)
    run(*words, "--adapt-seconds", 2)
    assert [settings.max_seconds for _, settings in stages] == [1.0, 2.0]


@pytest.fixture
def made(model: Path, prompts: Path, tmp_path: Path, stages: list[tuple[str, Any]]) -> list[Any]:
    """The words of a run that is complete, and was evaluated."""
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"prompt": "Say 3."}\n')
    words: list[Any] = ["run", model, tmp_path / "all", "--prompts", prompts, "--evaluate-on", held_out]
    for text in (SMALL[1], "max_tokens=12", "truncated_share=1", "progress=false"):
        words += ["--set", f"generate.{text}"]
    run(*words)
    stages.clear()
    return words


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--set", "generate.temperature=0.5"), r"generate stage .*temperature 0.8 \(not 0.5\).*delete .*answers"),
        (("--self-prompts", 2), "generate stage .*self_prompts"),
        (("--generate-seconds", 9), r"max_seconds null \(not 9"),
        (("--exclude", __file__), "generate stage .*other prompts to exclude"),
        (("--prompts", __file__), "generate stage .*other prompts:"),
        (("--set", "adapt.rank=4"), r"adapt stage .*rank 64 \(not 4\).*delete .*adapt and .*adapted"),
        (("--adapt-seconds", 2000), "adapt stage .*max_seconds 1200.0"),
    ],
    ids=str,
)
def test_a_stage_made_with_other_settings_or_inputs_is_not_skipped(
    made: list[Any], stages: list[tuple[str, Any]], more: tuple[Any, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run(*made, *more)
    assert stages == []


def test_what_does_not_change_a_result_may_differ(made: list[Any], stages: list[tuple[str, Any]]) -> None:
    text = run(*made, "--devices", 1, "--set", "adapt.log_every=5", "--set", "generate.max_running=7")
    assert (text.count("complete"), stages) == (3, [])


def test_another_original_is_told(made: list[Any], tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / made[1].name, layers=2)
    with pytest.raises(ConfigError, match="other model"):
        run(made[0], other, *made[2:])


def test_what_was_made_of_earlier_answers_is_not_skipped(made: list[Any], stages: list[tuple[str, Any]]) -> None:
    shutil.rmtree(made[2] / "answers")
    with pytest.raises(ConfigError, match=r"adapt stage .*other answers"):
        run(*made)
    shutil.rmtree(made[2] / "adapt")
    shutil.rmtree(made[2] / "adapted")
    run(*made)
    assert [name for name, _ in stages] == ["adapt", "evaluate"]


def test_a_finished_checkpoint_is_not_exported_under_other_settings(
    made: list[Any], stages: list[tuple[str, Any]]
) -> None:
    shutil.rmtree(made[2] / "adapted")
    with pytest.raises(ConfigError, match="learning_rate"):
        run(*made, "--set", "adapt.learning_rate=0.5")
    run(*made)
    assert [name for name, _ in stages] == ["adapt"]


def test_a_table_of_an_earlier_model_or_other_options_is_made_again(
    made: list[Any], stages: list[tuple[str, Any]]
) -> None:
    run(*made, "--set", "evaluate.limit=5")
    made += ["--set", "evaluate.limit=5", "--polish-seconds", 3]
    run(*made)
    assert [name for name, _ in stages] == ["evaluate", "polish", "evaluate"]
    assert stages[-1][1][0] == made[2] / "polished"
    assert run(*made).count("complete") == 4
    with pytest.raises(ConfigError, match=r"polish stage .*rounds .*polished.run and .*polished"):
        run(*made, "--set", "polish.rounds=7")
    assert len(stages) == 3


def test_results_without_a_record_are_taken_but_not_silently(made: list[Any], stages: list[tuple[str, Any]]) -> None:
    (made[2] / "answers" / "made_with.json").unlink()
    (made[2] / "adapt" / "made_with.json").unlink()
    assert run(*made).count("may be of other settings") == 2
    assert [name for name, _ in stages] == ["evaluate"]


def test_run_does_not_train_on_answers_that_are_not_complete(
    model: Path, prompts: Path, tmp_path: Path, stages: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = generating.GenerateSummary(5, 50, 1.0, 50.0, "stopped", {})
    monkeypatch.setattr(generating, "generate", lambda settings: stopped)
    with pytest.raises(ConfigError, match=r"generate stage .*go on"):
        run("run", model, tmp_path / "all", "--prompts", prompts)
    assert stages == []


def test_adapt_takes_its_options(model: Path, tmp_path: Path, stages: list[tuple[str, Any]]) -> None:
    run("adapt", model, "one", "two", "--out", tmp_path / "c", "--mode", "full", "--set", "max_steps=3")
    settings: AdaptSettings = stages[0][1]
    assert (settings.mode, settings.max_steps, settings.data) == ("full", 3, ["one", "two"])
    assert settings.run == str(tmp_path / "c.run")


@pytest.mark.parametrize("text", ["rank", "=3", "adapt.rank=3=", ".rank=3"])
def test_an_option_that_is_none_is_refused(text: str) -> None:
    fixed = {"base": "", "data": [], "run": "", "output": ""}
    with pytest.raises(ConfigError):
        options_from(AdaptSettings, fixed, {"max_steps": 1} | split_stages([text], None)[""])


@pytest.mark.parametrize("text", ["rank=3", "other.rank=3", "adapt.rank"])
def test_run_wants_the_stage_of_an_option(text: str) -> None:
    with pytest.raises(ConfigError, match="STAGE"):
        split_stages([text], ("generate", "adapt"))


@pytest.mark.parametrize("options", [{"limit": "many"}, {"turns": "some"}, {"seed": 1.5}, {"model": "m"}], ids=str)
def test_a_value_of_another_type_is_refused_by_name(options: dict[str, Any]) -> None:
    fixed = {"model": Path("m"), "out": Path("o"), "prompts": ()}
    with pytest.raises(ConfigError, match=next(iter(options))):
        options_from(GenerateSettings, fixed, {"self_prompts": 1, **options})


def test_values_are_json_or_text() -> None:
    texts = ["a=1", "b=[1, 2]", "c=text", "d=null", 'e="1"', "f=x=y"]
    assert split_stages(texts, None)[""] == {"a": 1, "b": [1, 2], "c": "text", "d": None, "e": "1", "f": "x=y"}


def test_the_command_line_imports_no_torch() -> None:
    code = "import sys, linocut.server.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_stage_is_a_command() -> None:
    text = run("--help")
    assert all(name in text for name in ("generate", "adapt", "polish", "evaluate", "run"))
    assert convert.app.registered_commands
