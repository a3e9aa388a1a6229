"""Held-out prompts of the usual evaluation files, and what their answers score."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linocut.engine.errors import ConfigError

from . import ifeval
from .sandbox import passes

# Tasks that have a score; every other file is only talked to.
SCORED = ("mawps", "gsm8k", "ifeval", "mbpp")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One question. id: "file:key", stable between runs. record: the line of the file, which scoring looks into."""

    id: str
    task: str
    text: str
    record: dict[str, Any] = field(repr=False, compare=False)


def task_of(record: Record) -> str:
    """The task that a record belongs to, told by its fields: one of SCORED, or "chat"."""
    if "instruction_id_list" in record:
        return "ifeval"
    if "test_list" in record:
        return "mbpp"
    if "question" in record and "####" in str(record.get("answer", "")):
        return "gsm8k"
    if "input" in record and isinstance(record.get("target"), (int, float)):
        return "mawps"
    return "chat"


def text_of(record: Record) -> str:
    """What the user says. MBPP is asked in the form of its paper (Austin et al., arXiv 2108.07732, section 2.1)."""
    if "test_list" in record:
        tests = "\n".join(record["test_list"])
        task = str(record["text"]).strip()
        return (
            f"You are an expert Python programmer, and here is your task: {task} "
            f"Your code should pass these tests:\n\n{tests}"
        )
    if record.get("turns"):
        return str(record["turns"][0])
    if record.get("messages"):
        return str(next(message["content"] for message in record["messages"] if message["role"] == "user"))
    for name in ("prompt", "question", "instruction", "input"):
        if isinstance(record.get(name), str):
            return str(record[name]).strip()
    raise ConfigError(f"no field of {sorted(record)} is known to hold a prompt")


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a JSON lines file (also gzipped). Raises ConfigError."""
    name = path.name.split(".")[0]
    prompts = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for index, line in enumerate(lines):
                record = json.loads(line)
                key = next((record[k] for k in ("key", "question_id", "task_id", "idx") if k in record), index)
                prompts.append(Prompt(f"{name}:{key}", task_of(record), text_of(record), record))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON lines: {error}") from None
    if len({prompt.id for prompt in prompts}) < len(prompts):
        prompts = [Prompt(f"{name}:{i}", p.task, p.text, p.record) for i, p in enumerate(prompts)]
    return prompts


def shuffled(prompts: Iterable[Prompt], seed: int) -> list[Prompt]:
    """All prompts in an order that depends on their ids and `seed` only: the first n are a sample of n."""
    order = sorted(prompts, key=lambda prompt: prompt.id)
    random.Random(seed).shuffle(order)
    return order


# With thousands separators or without. A minus is a sign only where it touches the number and nothing stands before it
# that could be subtracted from.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])-[$€£]?|[$€£]-)?(?P<size>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)


def last_number(text: str) -> float | None:
    """The last number of an answer, as a reader would take it: "$1,234." is 1234, "10-3=7" is 7."""
    last = next(reversed(list(_NUMBER.finditer(text))), None)
    if last is None:
        return None
    size = float(last["size"].replace(",", ""))
    return -size if last["sign"] else size


def is_right_number(text: str, gold: float) -> bool:
    number = last_number(text)
    return number is not None and math.isclose(number, gold, rel_tol=1e-4, abs_tol=1e-6)


def gold_of(record: Record) -> float:
    """The right number of a MAWPS or GSM8K record."""
    if "target" in record:
        return float(record["target"])
    return float(str(record["answer"]).rsplit("####", 1)[1].strip().replace(",", "").lstrip("$"))


_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def code_of(answer: str) -> str:
    """The first fenced block of an answer (it may be cut off), or all of it where there is no fence."""
    found = _FENCE.search(answer)
    return found[1] if found else answer


def program_of(answer: str, record: Record) -> str:
    """What has to run without an error: the answer's code, the set-up (which may use it), the assertions."""
    tests = "\n".join(record["test_list"])
    return f"{code_of(answer)}\n{record.get('test_setup_code', '')}\n{tests}\n".replace("\r\n", "\n")


Scores = dict[str, dict[str, Any]]


class Scorer:
    """Scores of answers by task; what was judged once is not judged again.

    execute_code: run the Python that a model wrote, in processes of their own (`sandbox.py`), `workers` at a time.
    """

    def __init__(self, *, execute_code: bool = True, workers: int = 4) -> None:
        self._execute, self._workers = execute_code, workers
        self._programs: dict[str, bool] = {}
        self._checkers = ifeval.load()
        self.left_out: set[str] = set()

    @property
    def notes(self) -> list[str]:
        """What the scores leave out, one sentence each."""
        notes = []
        if self._checkers is None:
            notes.append(f"IFEval is not scored: {ifeval.HOW_TO_INSTALL}")
        elif self.left_out:
            notes.append(f"IFEval without {', '.join(sorted(self.left_out))}: NLTK's punkt data is missing")
        if not self._execute:
            notes.append("MBPP is not scored: running the answers was not allowed")
        return notes

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """task -> {"score": share in 0..1, "count": prompts, ...} for the tasks of SCORED that are among `prompts`."""
        scores: Scores = {}
        for task in SCORED:
            pairs = [(p, text) for p, text in zip(prompts, texts, strict=True) if p.task == task]
            if not pairs:
                continue
            if task == "ifeval":
                result = self._ifeval(pairs)
                if result is not None:
                    scores[task] = result
            elif task == "mbpp":
                if self._execute:
                    scores[task] = _share(self._run([program_of(text, prompt.record) for prompt, text in pairs]))
            else:
                scores[task] = _share([is_right_number(text, gold_of(prompt.record)) for prompt, text in pairs])
        return scores

    def _ifeval(self, pairs: Sequence[tuple[Prompt, str]]) -> dict[str, Any] | None:
        if self._checkers is None:
            return None
        result = ifeval.loose(self._checkers, [(prompt.record, text) for prompt, text in pairs])
        self.left_out |= result.left_out
        share = _share(result.prompts)
        followed = sum(result.instructions)
        return {
            **share,
            "instruction_score": followed / max(len(result.instructions), 1),
            "instruction_count": len(result.instructions),
        }

    def _run(self, programs: Sequence[str]) -> list[bool]:
        new = list(dict.fromkeys(program for program in programs if program not in self._programs))
        with ThreadPoolExecutor(self._workers) as pool:
            self._programs.update(zip(new, pool.map(passes, new), strict=True))
        return [self._programs[program] for program in programs]


def _share(right: Sequence[bool]) -> dict[str, Any]:
    return {"score": sum(right) / max(len(right), 1), "correct": sum(right), "count": len(right)}
