"""The generate stage: answers are the engine's own, none is made twice, loops and evaluation prompts stay out."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tiny_checkpoint import END, write_tiny_checkpoint

from linocut.engine import LLM
from linocut.engine.errors import ConfigError, ModelError
from linocut.training import generate as stage
from linocut.training import generate_worker
from linocut.training.answers import Answer, read_answers, scan_answers, shard_path, shard_paths, write_shard
from linocut.training.generate import generate, read_summary
from linocut.training.generate_settings import GenerateSettings
from linocut.training.prompts import PromptFile

ENGINE = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_memory": 8 << 20}
QUESTIONS = [f"What is {i} plus {i * 37 % 91}?" for i in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), max_model_len=300, **ENGINE)


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> GenerateSettings:
    """All greedy, every truncated answer kept."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return GenerateSettings(
        model=model,
        out=tmp_path / "answers",
        prompts=(PromptFile(path),),
        max_tokens=48,
        prompt_limit=200,
        sampled_share=0.0,
        truncated_share=1.0,
        shard_tokens=1000,
        max_running=12,
        engine=ENGINE,
        progress=False,
    )


def change(settings: GenerateSettings, **fields: Any) -> GenerateSettings:
    return dataclasses.replace(settings, **fields)


def pairs(folder: Path) -> dict[tuple[int, ...], list[int]]:
    """Answers by prompt."""
    return {tuple(ids[:prompt].tolist()): ids[prompt:].tolist() for ids, prompt in read_answers(folder)}


def prompts(folder: Path, llm: LLM) -> list[str]:
    """The user's texts, as the shards hold them."""
    texts = [llm.tokenizer.decode(ids[:prompt]) for ids, prompt in read_answers(folder)]
    return [text.partition("user\n")[2].partition("<|im_end|>")[0] for text in texts]


def keys(folder: Path) -> list[int]:
    found: list[int] = []
    for path in shard_paths(folder):
        with safe_open(path, "np") as shard:
            found += shard.get_tensor("keys").tolist() + shard.get_tensor("skipped").tolist()
    return found


def test_greedy_answers_are_those_of_the_engine(settings: GenerateSettings, llm: LLM) -> None:
    summary = generate(settings)
    wanted = llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], max_tokens=48, temperature=0.0)
    texts = [
        llm.tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    ids = [tuple(llm.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    found = pairs(settings.out)
    answered = {prompt: choice.token_ids for prompt, (choice,) in zip(ids, wanted, strict=True)}
    assert found == {prompt: answered[prompt] for prompt in found}
    assert len(found) + summary.counts.get("looping", 0) == len(QUESTIONS)
    assert len(found) >= 16
    assert any(answer[-1] == END for answer in found.values())
    assert summary.answer_tokens == read_answers(settings.out).answer_tokens


def test_shards_have_the_format_that_training_reads(settings: GenerateSettings) -> None:
    generate(settings)
    assert len(shard_paths(settings.out)) > 1
    for path in shard_paths(settings.out):
        with safe_open(path, "np") as shard:
            tokens, lengths, starts = (shard.get_tensor(name) for name in ("tokens", "lengths", "prompt_lengths"))
            metadata = shard.metadata()
        assert {tokens.dtype, lengths.dtype, starts.dtype} == {np.dtype(np.int32)}
        assert lengths.sum() == len(tokens)
        assert (starts < lengths).all()
        assert metadata["model"] == settings.model.name
        assert (metadata["temperature"], metadata["seed"]) == ("0.8", "0")


def test_a_sampled_answer_depends_on_its_prompt_and_the_seed_alone(settings: GenerateSettings, tmp_path: Path) -> None:
    sampled = change(settings, sampled_share=1.0)
    generate(sampled)
    generate(change(sampled, out=tmp_path / "again", max_running=3, shard_tokens=400))
    generate(change(sampled, out=tmp_path / "other", seed=1))
    one, two, other = (pairs(folder) for folder in (settings.out, tmp_path / "again", tmp_path / "other"))
    assert one == two
    assert one != other


def test_the_sampled_share_is_a_share_and_further_answers_are_all_sampled(
    settings: GenerateSettings, tmp_path: Path, llm: LLM
) -> None:
    generate(settings)
    greedy = pairs(settings.out)
    mixed = change(settings, out=tmp_path / "mixed", sampled_share=0.5)
    generate(mixed)
    same = [greedy[prompt] == answer for prompt, answer in pairs(mixed.out).items() if prompt in greedy]
    assert 0.2 < np.mean(same) < 0.8
    twice = change(settings, out=tmp_path / "twice", prompts=(PromptFile(settings.prompts[0].path, 2),))
    summary = generate(twice)
    assert summary.counts["prompts prompts"] == 2 * len(QUESTIONS)
    assert len({tuple(ids.tolist()) for ids, _ in read_answers(twice.out)}) > 1.8 * len(greedy)


def test_an_interrupted_run_goes_on_without_making_anything_twice(settings: GenerateSettings) -> None:
    first = generate(change(settings, answer_tokens=400, shard_tokens=200))
    assert first.ended == "tokens"
    assert first.answers < len(QUESTIONS)
    before = {path: path.read_bytes() for path in shard_paths(settings.out)}
    second = generate(settings)
    assert second.ended == "prompts"
    assert all(path.read_bytes() == content for path, content in before.items())
    found = keys(settings.out)
    assert len(found) == len(set(found)) == len(QUESTIONS)
    third = generate(settings)
    assert (third.answers, third.counts.get("answers", 0)) == (second.answers, 0)
    assert keys(settings.out) == found


def test_a_damaged_shard_is_made_again(settings: GenerateSettings) -> None:
    generate(settings)
    whole, victim = pairs(settings.out), shard_paths(settings.out)[0]
    victim.write_bytes(victim.read_bytes()[:100])
    (settings.out / ".shard-00099.safetensors.partial").write_bytes(b"half")
    generate(settings)
    assert pairs(settings.out) == whole


def test_a_deadline_leaves_a_usable_set(settings: GenerateSettings, llm: LLM) -> None:
    generate(settings)
    whole = pairs(settings.out)
    many = settings.out.parent / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"Count to {i}."}) + "\n" for i in range(20_000)))
    late = change(settings, out=settings.out.parent / "late", prompts=(*settings.prompts, PromptFile(many)))
    summary = generate(change(late, max_seconds=2.5))
    assert summary.ended == "seconds"
    assert summary.seconds < 30
    found = pairs(late.out)
    assert 0 < len(found) == summary.answers < 20_000
    for prompt, answer in found.items():
        assert answer == whole.get(prompt, answer)[: len(answer)]
    assert read_summary(late.out) is not None


def with_many(settings: GenerateSettings, **fields: Any) -> GenerateSettings:
    """More prompts than any test answers."""
    many = settings.out.parent / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"Count to {i}."}) + "\n" for i in range(20_000)))
    return change(settings, prompts=(PromptFile(many),), max_seconds=40, **fields)


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "generate.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_sigterm_leaves_what_there_is(settings: GenerateSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    step = generate_worker.Worker._step

    def step_and_signal(worker: generate_worker.Worker) -> None:
        step(worker)
        if worker.counts["answers"] >= 5 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    sent: list[bool] = []
    monkeypatch.setattr(generate_worker.Worker, "_step", step_and_signal)
    ours = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        handler = signal.getsignal(signal.SIGTERM)
        summary = generate(with_many(settings))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, ours)
    assert summary.ended == "stopped"
    assert scan_answers(settings.out).answers == summary.answers >= 5
    assert read_summary(settings.out) is None


def test_a_worker_that_fails_keeps_its_answers_and_the_stage_goes_on_later(
    settings: GenerateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = generate_worker.Worker._step

    def fail(worker: generate_worker.Worker) -> None:
        step(worker)
        if worker.counts["answers"] >= 5:
            raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(generate_worker.Worker, "_step", fail)
        with pytest.raises(ModelError, match="device is lost"):
            generate(change(settings, shard_tokens=1_000_000))
    assert scan_answers(settings.out).answers >= 5
    assert read_summary(settings.out) is None
    assert generate(settings).ended == "prompts"
    found = keys(settings.out)
    assert len(found) == len(set(found)) == len(QUESTIONS)


def test_a_process_that_is_ended_writes_its_answers_and_the_stage_is_not_complete(
    settings: GenerateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, found = stage.workers, {}

    def end_one() -> None:
        while not any(event["event"] == "ready" and event["worker"] == 1 for event in events(settings.out)):
            time.sleep(0.1)
        time.sleep(1.5)
        found["workers"].processes[1].terminate()
        # The others come to their end as at a deadline.
        time.sleep(1.5)
        found["workers"].stop.set()

    class Observed:
        def __init__(self, tasks: list[Any]) -> None:
            self.context = workers(tasks)

        def __enter__(self) -> Any:
            found["workers"] = self.context.__enter__()
            threading.Thread(target=end_one, daemon=True).start()
            return found["workers"]

        def __exit__(self, *error: Any) -> Any:
            return self.context.__exit__(*error)

    monkeypatch.setattr(stage, "workers", Observed)
    with pytest.raises(ModelError, match=r"1 of 2 .*told to end.*goes on"):
        generate(with_many(settings, processes=2))
    assert read_summary(settings.out) is None
    assert {event["worker"] for event in events(settings.out) if event["event"] == "shard"} == {0, 1}
    assert len(read_answers(settings.out)) > 0


def test_shards_are_written_from_time_to_time(
    settings: GenerateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = change(settings, shard_tokens=1_000_000)
    generate(whole)
    assert len(shard_paths(whole.out)) == 1
    monkeypatch.setattr(generate_worker, "FLUSH", 0.0)
    monkeypatch.setattr(generate_worker, "REPORT", 0.0)
    parts = change(whole, out=tmp_path / "parts")
    generate(parts)
    assert len(shard_paths(parts.out)) > 1
    assert pairs(parts.out) == pairs(whole.out)
    # The share of the truncated is one of all answers, however few a shard holds.
    thin = change(whole, out=tmp_path / "thin", truncated_share=0.8)
    generate(thin)
    monkeypatch.undo()
    large = change(thin, out=tmp_path / "large")
    generate(large)
    counts = [sum(ids[-1] != END for ids, _ in read_answers(folder)) for folder in (thin.out, large.out)]
    assert counts[0] == counts[1] > 0


def test_loops_are_dropped_and_not_asked_for_again(settings: GenerateSettings, tmp_path: Path) -> None:
    repeating = change(settings, model=write_tiny_checkpoint(tmp_path / "repeats", repeats=True), max_tokens=150)
    summary = generate(repeating)
    assert summary.answers == 0
    assert summary.counts["looping"] == len(QUESTIONS)
    # A loop is seen while it runs: no answer takes its 150 forwards.
    assert summary.counts["forwards"] < len(QUESTIONS) / 12 * 100
    assert generate(repeating).counts.get("looping", 0) == 0


def test_at_most_a_share_of_the_answers_is_truncated(settings: GenerateSettings) -> None:
    summary = generate(change(settings, truncated_share=0.2, shard_tokens=1_000_000))
    endings = [ids[-1] == END for ids, _ in read_answers(settings.out)]
    assert np.mean(endings) >= 0.8
    assert summary.counts["truncated dropped"] > 0
    assert len(set(keys(settings.out))) == len(QUESTIONS)


def test_evaluation_prompts_are_not_answered(settings: GenerateSettings, tmp_path: Path, llm: LLM) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(json.dumps({"question": question}) + "\n" for question in QUESTIONS[:16]))
    summary = generate(change(settings, exclude=(held_out,)))
    assert summary.counts["prompts excluded"] == 16
    assert set(prompts(settings.out, llm)) <= set(QUESTIONS[16:])


def test_long_prompts_and_those_the_template_refuses_are_counted(settings: GenerateSettings, tmp_path: Path) -> None:
    records = [
        {"prompt": "x" * 300},
        {"messages": [{"role": "narrator", "content": "Once."}, {"role": "user", "content": "and?"}]},
        {"prompt": "fine"},
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = generate(change(settings, prompts=(PromptFile(path),)))
    assert (summary.counts["prompt too long"], summary.counts["refused"]) == (1, 1)


def test_the_model_asks_itself(settings: GenerateSettings, llm: LLM) -> None:
    summary = generate(change(settings, prompts=(), self_prompts=20))
    assert summary.answers >= 2
    assert summary.answers + sum(
        summary.counts.get(name, 0) for name in ("self-prompt unusable", "looping", "empty", "prompt too long")
    ) == len(set(keys(settings.out)))
    for ids, prompt in read_answers(settings.out):
        text = llm.tokenizer.decode(ids[:prompt])
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert generate(change(settings, prompts=(), self_prompts=20)).counts.get("answers", 0) == 0


def test_several_processes_share_the_prompts(settings: GenerateSettings) -> None:
    alone = settings.out.parent / "alone"
    generate(change(settings, out=alone))
    summary = generate(change(settings, processes=2))
    assert pairs(settings.out) == pairs(alone)
    assert len(keys(settings.out)) == len(QUESTIONS)
    assert "failed processes" not in summary.counts


def test_a_folder_of_another_models_answers_is_refused(settings: GenerateSettings) -> None:
    write_shard(shard_path(settings.out, 0), [Answer(1, [5], [6, END], True)], [2], {"model": "another"})
    with pytest.raises(ConfigError, match="another"):
        generate(settings)


def test_a_model_without_a_chat_template_is_refused(settings: GenerateSettings, tmp_path: Path) -> None:
    bare = write_tiny_checkpoint(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="chat template"):
        generate(change(settings, model=bare))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": ()},
        {"sampled_share": 1.5},
        {"temperature": 0.0},
        {"max_tokens": 0},
        {"max_seconds": 0.0},
        {"processes": 0},
        {"limit": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: GenerateSettings, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        change(settings, **fields)


def test_the_log_is_json_lines(settings: GenerateSettings) -> None:
    summary = generate(settings)
    events = [json.loads(line) for line in (settings.out / "generate.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][:2] == ["start", "prompts"]
    assert events[-1]["event"] == "end"
    assert events[-1]["answers"] == summary.answers == scan_answers(settings.out).answers
    assert read_summary(settings.out) == dataclasses.asdict(summary)
