"""Scoring of answers: numbers, programs, instructions."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from linocut.engine.errors import ConfigError
from linocut.training import ifeval
from linocut.training.sandbox import passes
from linocut.training.tasks import (
    Prompt,
    Scorer,
    code_of,
    gold_of,
    is_right_number,
    last_number,
    read_prompts,
    shuffled,
)

MBPP = {
    "text": "Write a function that doubles a number.",
    "task_id": 11,
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
}
RECORDS: dict[str, dict[str, Any]] = {
    "ifeval": {"key": 7, "prompt": "Say no comma.", "instruction_id_list": ["a:b"], "kwargs": [{}]},
    "mbpp": MBPP,
    "gsm8k": {"question": "How many?", "answer": "2*617=<<2*617=1234>>1234\n#### 1,234"},
    "mawps": {"input": "How much is it ?", "target": 12.5, "type": "x", "idx": 3},
    "chat": {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Now shorter."]},
}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("That makes 1,234.", 1234),
        ("It costs $12.50", 12.5),
        ("It costs $1,234,567.89 in all.", 1234567.89),
        ("The answer is 7.", 7),
        ("10 - 3 = 7", 7),
        ("10-3", 3),
        ("She owes -5", -5),
        ("She owes -$5.25", -5.25),
        ("the result (-4)", -4),
        ("- 7 apples", 7),
        ("2, 3, 4", 4),
        ("1,2345", 2345),
        ("50%", 50),
        (".5", 0.5),
        ("**42**", 42),
        ("\\boxed{18}", 18),
        ("3x7=21\n\nSo 21 apples", 21),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_last_number_of_an_answer(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_a_number_is_right_whatever_its_form() -> None:
    assert is_right_number("The total is $70.00.", 70)
    assert is_right_number("1/3 is 0.33333", 1 / 3)
    assert not is_right_number("There were 70 of 71", 70)
    assert not is_right_number("seven", 7)
    assert gold_of(RECORDS["gsm8k"]) == 1234
    assert gold_of(RECORDS["mawps"]) == 12.5


@pytest.mark.parametrize(
    "answer",
    [
        "def double(x):\n    return 2 * x",
        "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles. ```python\n1/0\n```",
        "```\r\ndef double(x):\r\n    return 2 * x\r\n",
        "```py\nimport math, re, collections\nprint('x' * 100000)\ndef double(x): return math.prod((2, x))",
    ],
)
def test_code_is_found_and_judged_by_its_assertions(answer: str) -> None:
    prompt = Prompt("mbpp:11", "mbpp", "", MBPP)
    scores = Scorer().score([prompt, prompt], [answer, answer.replace("2", "3")])
    assert scores == {"mbpp": {"score": 0.5, "correct": 1, "count": 2}}


def test_the_first_fenced_block_counts() -> None:
    assert code_of("a\n```python\nx = 1\n```\n```\ny\n```") == "x = 1\n"
    assert code_of("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def (",
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "import multiprocessing\n[multiprocessing.Process(target=print).start() for _ in range(9)]",
        "import subprocess; subprocess.run(['true'])",
        "x = [0] * 10**10",
        "x = 'a'\nwhile True: x += x",
        "import sys; sys.exit(0)\nassert False",
        "import os; os._exit(0)",
        "open('left-behind', 'w')",
        "import os; os.mkdir('x')",
        "import shutil; shutil.rmtree('.')",
        "import socket; socket.socket()",
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
        "import ctypes; ctypes.CDLL(None)",
        "def f(): return f()\nf()",
        "raise KeyboardInterrupt",
    ],
)
def test_a_program_that_does_not_end_well_fails_and_is_stopped(program: str) -> None:
    began = time.perf_counter()
    assert not passes(program, seconds=1)
    assert time.perf_counter() - began < 10


def test_a_program_that_sleeps_is_stopped() -> None:
    began = time.perf_counter()
    assert not passes("import time; time.sleep(60)", seconds=0.5)
    assert time.perf_counter() - began < 10


def test_a_program_sees_neither_the_environment_nor_our_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    assert "A_SECRET" in os.environ
    assert passes("import os, sys\nassert 'A_SECRET' not in os.environ\nassert sys.stdin.read() == ''")


def test_running_code_can_be_refused() -> None:
    scorer = Scorer(execute_code=False)
    assert scorer.score([Prompt("mbpp:11", "mbpp", "", MBPP)], ["def double(x): return 2 * x"]) == {}
    assert any("MBPP" in note for note in scorer.notes)


def test_prompts_are_read_whatever_the_file(tmp_path: Path) -> None:
    for name, record in RECORDS.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress((json.dumps(record) + "\n").encode()))
        (prompt,) = read_prompts(path)
        assert prompt.task == name
    assert read_prompts(tmp_path / "chat.jsonl.gz")[0].text == "Write a poem."
    assert read_prompts(tmp_path / "ifeval.jsonl.gz")[0].id == "ifeval:7"
    asked = read_prompts(tmp_path / "mbpp.jsonl.gz")[0].text
    assert MBPP["text"] in asked
    assert asked.endswith("assert double(2) == 4\nassert double(-1) == -2")


def test_keys_that_repeat_give_way_to_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "key": 1}\n{"prompt": "b", "key": 1}\n')
    assert [prompt.id for prompt in read_prompts(path)] == ["p:0", "p:1"]


@pytest.mark.parametrize("text", ["not json\n", '{"nothing": "known"}\n'])
def test_an_unreadable_file_of_prompts_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ConfigError):
        read_prompts(tmp_path / "p.jsonl")


def test_a_sample_depends_on_ids_and_seed_only() -> None:
    prompts = [Prompt(f"p:{i}", "chat", str(i), {}) for i in range(50)]
    order = shuffled(prompts, 0)
    assert sorted(prompt.id for prompt in order) == sorted(prompt.id for prompt in prompts)
    assert shuffled(reversed(prompts), 0) == order
    assert shuffled(prompts, 1) != order


class NoComma:
    def __init__(self, name: str) -> None:
        self.given: dict[str, Any] = {}

    def build_description(self, **given: Any) -> None:
        self.given |= given

    def get_instruction_args(self) -> Mapping[str, Any]:
        return {}

    def check_following(self, text: str) -> bool:
        return "," not in text and "*" not in text


class Repeats(NoComma):
    def get_instruction_args(self) -> Mapping[str, Any]:
        return {"prompt": None}

    def check_following(self, text: str) -> bool:
        return text.startswith(self.given["prompt"])


class LacksData(NoComma):
    def check_following(self, text: str) -> bool:
        raise LookupError("punkt")


CHECKERS = {"no_comma": NoComma, "repeat": Repeats, "sentences": LacksData}


def ask(*names: str) -> dict[str, Any]:
    return {"prompt": "Say it.", "instruction_id_list": list(names), "kwargs": [{} for _ in names]}


def test_loose_accuracy_forgives_first_and_last_lines_and_asterisks() -> None:
    answers = [
        (ask("no_comma"), "Sure, here it is:\n**fine**"),
        (ask("no_comma"), "a, b"),
        (ask("no_comma", "repeat"), "Say it.\nsaid"),
        (ask("no_comma", "repeat"), "said"),
        (ask("no_comma"), ""),
    ]
    result = ifeval.loose(CHECKERS, answers)
    assert result.prompts == [True, False, True, False, False]
    assert result.instructions == [True, False, True, True, True, False, False]


def test_instructions_without_their_data_are_left_out_and_named() -> None:
    result = ifeval.loose(CHECKERS, [(ask("sentences", "no_comma"), "fine"), (ask("sentences"), "fine")])
    assert result.prompts == [True]
    assert result.instructions == [True]
    assert result.left_out == {"sentences"}


def test_ifeval_without_its_checkers_is_named_in_the_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ifeval, "load", lambda: None)
    scorer = Scorer()
    assert scorer.score([Prompt("ifeval:1", "ifeval", "", ask("no_comma"))], ["fine"]) == {}
    assert any("IFEval" in note for note in scorer.notes)


def test_the_checkers_of_lm_eval_load_alone() -> None:
    checkers = ifeval.load()
    if checkers is None:
        pytest.skip("lm-eval or what its checkers need is not installed")
    result = ifeval.loose(checkers, [(ask("punctuation:no_comma"), "a, b"), (ask("punctuation:no_comma"), "a b")])
    assert result.prompts == [False, True]
