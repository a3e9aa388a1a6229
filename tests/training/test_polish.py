"""The polish stage: rounds of roll-outs and training, which resume and make right rows more certain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoint import write_tiny_checkpoint
from torch.nn import functional as F

from linocut.engine import LLM
from linocut.engine.errors import ConfigError
from linocut.training import polish as stage
from linocut.training.adapt import adapt
from linocut.training.answers import read_answers
from linocut.training.documents import load_documents
from linocut.training.generate import generate
from linocut.training.generate_settings import GenerateSettings
from linocut.training.polish import PolishSettings, polish
from linocut.training.prompts import PromptFile
from linocut.training.segments import Noise, clean_visibility
from linocut.training.settings import AdaptSettings
from linocut.training.trainer import Trainer

ENGINE = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 8 << 20}
TRAIN = {"device": "cpu", "length": 128, "rows": 4, "held_out": 4, "log_every": 10}
MASK, BLOCK = 4, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny original (base), its answers, the model converted from it (converted), its roll-outs of other prompts."""
    folder = tmp_path_factory.mktemp("made")
    base = write_tiny_checkpoint(folder / "base")
    for name, start in (("prompts", 0), ("others", 1000)):
        lines = [json.dumps({"prompt": f"What is {start + i} plus {i * 37 % 91}?"}) + "\n" for i in range(48)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    generate(generating(folder, base, "prompts", folder / "answers"))
    adapt(
        AdaptSettings(
            str(base), [str(folder / "answers")], str(folder / "adapt"), str(folder / "converted"), mask_token_id=MASK,
            rank=8, segments=[BLOCK], partial=0.5, max_steps=60, learning_rate=3e-3, **TRAIN,
        )
    )  # fmt: skip
    diffusion = {"strategy": "threshold", "threshold": 0.9}
    generate(generating(folder, folder / "converted", "others", folder / "held_out", diffusion=diffusion))
    return folder


def generating(folder: Path, model: Path, prompts: str, out: Path, **changes: Any) -> GenerateSettings:
    values = {
        "max_tokens": 40, "prompt_limit": 100, "sampled_share": 0.0, "truncated_share": 1.0, "max_running": 16,
        "engine": ENGINE, "progress": False,
    }  # fmt: skip
    return GenerateSettings(
        model=model, out=out, prompts=(PromptFile(folder / f"{prompts}.jsonl"),), **values | changes
    )


def settings(made: Path, output: Path, **changes: Any) -> PolishSettings:
    values = {
        "model": str(made / "converted"), "base": str(made / "base"), "output": str(output),
        "data": [str(made / "answers")], "rounds": 1, "rollouts": 24, "max_tokens": 40, "prompt_limit": 100,
        "steps": 40, "learning_rate": 2e-3, "engine": ENGINE, "train": TRAIN, "progress": False,
    }  # fmt: skip
    return PolishSettings(**(values | changes))


def certainty(made: Path, model: Path) -> tuple[float, float]:
    """Mean entropy (nats) of the rows that predict the held-out roll-outs' tokens rightly, and their share."""
    run = AdaptSettings(
        str(made / "base"), [], str(model / "none"), str(model / "none"), mask_token_id=MASK,
        init_adapter=str(model / "adapter.safetensors"), rank=8, segments=[BLOCK], max_steps=1, **TRAIN,
    )  # fmt: skip
    trainer = Trainer(run, load_documents([made / "held_out"], run.length))
    network, entropies, right, rows = trainer.network, 0.0, 0.0, 0.0
    for partial in (False, True):
        (batch,), _ = trainer.make_batches(Noise(BLOCK, partial))
        segments = batch.segments
        with torch.no_grad():
            clean = network._clean_mask.update(clean_visibility(batch.rows, run.context, BLOCK))
            _, context = network.run_clean(batch.rows, network.decoder, network._none, clean)
            hidden = network.run_noisy(segments, context, network._noisy_mask.update(segments.visibility))
            logp = F.linear(hidden, network.decoder.head).log_softmax(-1)  # [rows, noisy_rows, vocab]
        counted = segments.weight > 0
        correct = counted & (logp.argmax(-1) == batch.rows.tokens.gather(1, segments.target))
        entropies -= float((logp.exp() * logp).sum(-1)[correct].sum())
        right, rows = right + float(correct.sum()), rows + float(counted.sum())
    return entropies / right, right / rows


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def prompts(folder: Path) -> set[tuple[int, ...]]:
    return {tuple(ids[:length].tolist()) for ids, length in read_answers(folder)}


FORCE = 12.0  # enough for a round of a hundred updates to tell


def test_a_round_makes_right_rows_more_certain_and_certainty_forcing_is_why(made: Path, tmp_path: Path) -> None:
    before, share_before = certainty(made, made / "converted")
    polished, entropy, share = {}, {}, {}
    for weight in (FORCE, 0.0):
        output = tmp_path / f"forced-{weight}"
        polished[weight] = polish(settings(made, output, certainty=weight, kl=0.1, ce=0.5, partial=0.5, steps=100))
        entropy[weight], share[weight] = certainty(made, polished[weight])
    assert entropy[FORCE] < 0.9 * before
    assert entropy[FORCE] < 0.9 * entropy[0.0]
    # Not by being right seldom.
    assert share[FORCE] > 0.75 * share_before


def test_roll_outs_are_the_engines_block_decoding_of_the_answers_prompts(made: Path, tmp_path: Path) -> None:
    output = polish(settings(made, tmp_path / "out", steps=1, block_size=2, threshold=0.3, rollouts=10))
    rollouts = tmp_path / "out.run" / "round-000" / "rollouts"
    found = {tuple(ids[:n].tolist()): ids[n:].tolist() for ids, n in read_answers(rollouts)}
    assert len(found) == len(prompts(rollouts) & prompts(made / "answers")) == 10
    llm = LLM(str(made / "converted"), block_size=2, max_model_len=140, **ENGINE)
    diffusion = {"strategy": "threshold", "threshold": 0.3}
    wanted = llm.generate([list(prompt) for prompt in found], max_tokens=40, temperature=0.0, diffusion=diffusion)
    assert list(found.values()) == [choice.token_ids for (choice,) in wanted]
    record = events(tmp_path / "out.run")[1]
    tokens, forwards = (sum(f(c) for (c,) in wanted) for f in (lambda c: len(c.token_ids), lambda c: c.forwards))
    assert record["rollouts"]["tokens_per_forward"] == pytest.approx(tokens / forwards, abs=1e-3)
    assert json.loads((output / "config.json").read_text())["linocut"]["block_size"] == BLOCK


def test_an_interrupted_stage_ends_as_an_uninterrupted_one(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rounds": 2, "steps": 3, "rollouts": 12}
    whole = polish(settings(made, tmp_path / "whole", **options))

    class Killed(Exception):
        pass

    real = Trainer.update

    def dies(self: Trainer, rate: float) -> int:
        if self.settings.run.endswith("round-001/train") and self.progress.step == 2:
            raise Killed
        return real(self, rate)

    frequent = {**TRAIN, "checkpoint_seconds": -1.0}
    monkeypatch.setattr(Trainer, "update", dies)
    with pytest.raises(Killed):
        polish(settings(made, tmp_path / "parts", **options, train=frequent))
    assert not (tmp_path / "parts" / "config.json").exists()
    monkeypatch.setattr(Trainer, "update", real)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts.run").rglob("shard-*")}
    parts = polish(settings(made, tmp_path / "parts", **options))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "parts.run").rglob("shard-*")}
    one, other, start = (load_file(f / "adapter.safetensors") for f in (whole, parts, made / "converted"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=0, rtol=0)
    assert any(not torch.equal(one[name], start[name]) for name in start)
    # A third call has nothing to do but to copy.
    polish(settings(made, tmp_path / "parts", **options))
    assert [e["kind"] for e in events(tmp_path / "parts.run")].count("round") == 2


def test_each_round_goes_on_from_the_one_before_with_other_prompts(made: Path, tmp_path: Path) -> None:
    polish(settings(made, tmp_path / "out", rounds=2, steps=2, rollouts=12))
    first, second = (tmp_path / "out.run" / f"round-00{i}" for i in range(2))
    given = json.loads((second / "train" / "settings.json").read_text())
    assert given["init_adapter"] == str(first / "train" / "adapter.safetensors")
    assert prompts(first / "rollouts") != prompts(second / "rollouts")
    assert not (first / "model").exists()
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == (
        second / "model" / "adapter.safetensors"
    ).read_bytes()


def test_the_share_of_replayed_answers_is_kept(made: Path, tmp_path: Path) -> None:
    polish(settings(made, tmp_path / "out", steps=1, share=0.4))
    folder = tmp_path / "out.run" / "round-000"
    rolled, replayed = (read_answers(folder / name) for name in ("rollouts", "replay"))
    share = len(replayed.tokens) / (len(replayed.tokens) + len(rolled.tokens))
    assert share == pytest.approx(0.4, abs=0.04)
    answers = {tuple(ids.tolist()): n for ids, n in read_answers(made / "answers")}
    assert all(answers[tuple(ids.tolist())] == n for ids, n in replayed)
    polish(settings(made, tmp_path / "none", steps=1, share=0.0))
    assert not (tmp_path / "none.run" / "round-000" / "replay").exists()


def test_sampled_roll_outs_of_prompt_files(made: Path, tmp_path: Path) -> None:
    files = [str(made / "others.jsonl")]
    polish(settings(made, tmp_path / "out", data=[], prompts=files, temperature=0.7, steps=1))
    rollouts = tmp_path / "out.run" / "round-000" / "rollouts"
    assert prompts(rollouts)
    assert prompts(rollouts).isdisjoint(prompts(made / "answers"))
    with safe_open(rollouts / "shard-00000.safetensors", "np") as shard:
        assert (shard.metadata()["temperature"], shard.metadata()["sampled_share"]) == ("0.7", "1.0")


def test_a_merged_adapter_is_polished_from_its_run(made: Path, tmp_path: Path) -> None:
    adapt(
        AdaptSettings(
            str(made / "base"), [str(made / "answers")], str(tmp_path / "run"), str(tmp_path / "merged"), rank=4,
            mode="lora", mask_token_id=MASK, max_steps=2, segments=[BLOCK], **TRAIN,
        )
    )  # fmt: skip
    merged = {"model": str(tmp_path / "merged"), "steps": 2, "rounds": 2}
    with pytest.raises(ConfigError, match="merged"):
        polish(settings(made, tmp_path / "out", **merged))
    out = polish(settings(made, tmp_path / "out", adapter=str(tmp_path / "run" / "adapter.safetensors"), **merged))
    assert not (out / "adapter.safetensors").exists()
    given = json.loads((tmp_path / "out.run" / "round-001" / "train" / "settings.json").read_text())
    assert (given["mode"], given["rank"], given["base"]) == ("lora", 4, str(made / "base"))


def test_time_is_shared_between_rounds_and_their_halves(made: Path, tmp_path: Path) -> None:
    timed = settings(made, tmp_path / "out", steps=None, max_seconds=60.0, rounds=3, rollout_share=0.25)
    assert timed.seconds == 20.0
    assert stage._Polish(timed)._train_settings(0, Path("a")).max_seconds == 15.0


def test_on_gpus_training_has_processes_of_its_own(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[AdaptSettings, int]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(stage, "launch", lambda settings, count: launched.append((settings, count)))
    given = stage._Polish(settings(made, tmp_path / "out", train={}))._train_settings(0, Path("a"))
    for devices in (None, 1):
        stage._adapt(given, devices)
    assert launched == [(given, 2), (given, 1)]


@pytest.mark.parametrize(
    "fields",
    [
        {"data": []},
        {"steps": None},
        {"share": 1.0},
        {"rounds": 0},
        {"temperature": -1.0},
        {"train": {"rank": 4}},
        {"train": {"nonsense": 4}},
        {"kl": 0.0},
        {"output": "MODEL"},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(made: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    if "output" in fields:
        fields = {"output": str(made / "converted")}
    with pytest.raises(ConfigError):
        polish(settings(made, **{"output": tmp_path / "out", **fields}))


def test_a_roll_out_without_time_is_told_and_can_be_tried_again(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allow more time"):
        polish(settings(made, tmp_path / "out", steps=1, max_seconds=0.01))
    polish(settings(made, tmp_path / "out", steps=1))
    assert (tmp_path / "out" / "config.json").is_file()
