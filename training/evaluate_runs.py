"""Answers to the evaluation's prompts through the engine, one file line a setting, so that a stopped run goes on."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linocut.engine.errors import ConfigError, ModelError, ParameterError
from linocut.engine.llm import LLM, Completion

from .evaluate_settings import Setting

Report = Callable[[str], None]
# Forwards of each size are compiled and captured before the clock starts.
WARM_UP_TOKENS = 12


@dataclass(frozen=True)
class Answered:
    """The answer to one prompt. tokens include the stop token that ended it, text does not."""

    id: str
    tokens: list[int]
    text: str
    forwards: int
    finish: str


@dataclass(frozen=True)
class Run:
    """What one setting answered. seconds: of the table's prompts. more: answers to prompts for task scores only."""

    setting: str
    block_size: int
    seconds: float
    answers: list[Answered]
    more: list[Answered]


@dataclass(frozen=True)
class Question:
    id: str
    ids: list[int]


class RunFile:
    """`answers.jsonl`: a line for each setting that has been run, of the run named by `fingerprint` only."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint

    def read(self) -> dict[str, Run]:
        return {run.setting: run for mark, run in read_runs(self._path) if mark == self._fingerprint}

    def start(self) -> None:
        """Drop what other runs left, and a last line that was cut off."""
        part = self._path.with_name(f"{self._path.name}.partial")
        part.write_text("".join(self._line(run) for run in self.read().values()), encoding="utf-8")
        os.replace(part, self._path)

    def add(self, run: Run) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(self._line(run))

    def _line(self, run: Run) -> str:
        return json.dumps({"fingerprint": self._fingerprint, **asdict(run)}, ensure_ascii=False) + "\n"


def read_runs(path: Path) -> Iterator[tuple[str, Run]]:
    """(fingerprint, run) of each whole line."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        mark = fields.pop("fingerprint")
        for name in ("answers", "more"):
            fields[name] = [Answered(**answer) for answer in fields[name]]
        yield mark, Run(**fields)


def run_settings(
    folder: Path,
    settings: Sequence[Setting],
    table: Sequence[Question],
    more: Sequence[Question],
    tokenizer: Any,
    *,
    max_tokens: int,
    config: dict[str, Any],
    done: Callable[[Run], None],
    report: Report,
) -> list[str]:
    """Run `settings`, all of one model folder and one block size, on one engine; a sentence for each skipped one.

    A block size or a strategy that the folder does not support is skipped; any other failure is raised.
    """
    size = settings[0].block_size
    try:
        llm = LLM(str(folder), **config, **({} if size is None else {"block_size": size}))
    except (ConfigError, ModelError) as error:
        if size is None:
            raise
        return [f"{setting.label} skipped: {error}" for setting in settings]
    skipped = []
    for setting in settings:
        try:
            done(_run(llm, setting, table, more, tokenizer, max_tokens))
        except ParameterError as error:
            skipped.append(f"{setting.label} skipped: {error}")
        else:
            report(f"{setting.label} answered")
    return skipped


def release() -> None:
    """Give back what an engine held on the device, so that the next one may take it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _run(
    llm: LLM, setting: Setting, table: Sequence[Question], more: Sequence[Question], tokenizer: Any, max_tokens: int
) -> Run:
    def generate(questions: Sequence[Question], most: int) -> list[Completion]:
        ids: list[str | list[int]] = [question.ids for question in questions]
        answers = llm.generate(ids, max_tokens=most, temperature=0.0, diffusion=setting.diffusion)
        return [answer for (answer,) in answers]

    def answered(questions: Sequence[Question], answers: Sequence[Completion]) -> list[Answered]:
        texts = [a.token_ids if a.stop_token is None else a.token_ids[:-1] for a in answers]
        return [
            Answered(q.id, a.token_ids, tokenizer.decode(text, skip_special_tokens=True), a.forwards, a.finish_reason)
            for q, a, text in zip(questions, answers, texts, strict=True)
        ]

    on_gpu = llm.core.info.device.startswith("cuda")
    generate(table if on_gpu else table[:1], min(max_tokens, WARM_UP_TOKENS))
    began = time.perf_counter()
    answers = generate(table, max_tokens)
    seconds = time.perf_counter() - began
    others = answered(more, generate(more, max_tokens) if more else [])
    return Run(setting.label, llm.core.info.block_size, seconds, answered(table, answers), others)
