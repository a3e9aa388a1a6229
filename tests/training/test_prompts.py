"""From records to prompts: which turns, which records, how often."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from linocut.engine.errors import ConfigError
from linocut.training.looping import is_looping, tail_repeats
from linocut.training.prompts import (
    Exclusion,
    PromptFile,
    conversations,
    expand,
    prompt_key,
    read_exclusion,
    read_prompts,
)


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALK = [user("one"), answer("uno"), user("two"), answer("due")]
WORDS = "the quick brown fox jumps over the lazy dog while nine old hens look on from the fence"


def test_a_prompt_ends_with_the_last_user_turn_or_with_each() -> None:
    assert conversations({"messages": TALK}, "last") == [TALK[:3]]
    assert conversations({"messages": TALK}, "all") == [TALK[:1], TALK[:3]]
    assert conversations({"prompt": "hello"}, "last") == [[user("hello")]]


@pytest.mark.parametrize(
    "record",
    [{}, {"messages": []}, {"messages": [answer("a")]}, {"messages": "text"}, {"messages": [{"role": "user"}]}],
    ids=str,
)
def test_a_record_without_a_user_turn_yields_nothing(record: dict[str, Any], tmp_path: Path) -> None:
    assert conversations(record, "all") == []
    prompts, counts = read_prompts([PromptFile(lines(tmp_path / "a.jsonl", [record]))])
    assert (prompts, counts.unusable) == ([], 1)


def test_gzip_and_plain_files_read_alike(tmp_path: Path) -> None:
    records = [{"prompt": f"question {i}"} for i in range(5)]
    plain, _ = read_prompts([PromptFile(lines(tmp_path / "a.jsonl", records))])
    packed, _ = read_prompts([PromptFile(lines(tmp_path / "b.jsonl.gz", records))])
    assert {p.key for p in plain} == {p.key for p in packed}


def test_no_text_is_a_prompt_twice_whatever_its_case_and_white_space(tmp_path: Path) -> None:
    one = lines(tmp_path / "a.jsonl", [{"prompt": "Say  hello"}, {"prompt": "say hello\n"}])
    two = lines(tmp_path / "b.jsonl", [{"messages": [user("SAY HELLO")]}])
    prompts, counts = read_prompts([PromptFile(one), PromptFile(two)])
    assert (len(prompts), counts.duplicates) == (1, 2)


def test_a_weight_asks_for_several_answers_or_for_some_of_the_records(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"prompt": f"question {i}"} for i in range(400)])
    many, _ = read_prompts([PromptFile(path, 3)])
    assert len(many) == len({p.key for p in many}) == 1200
    assert {p.copy for p in many} == {0, 1, 2}
    some, _ = read_prompts([PromptFile(path, 0.25)])
    assert 60 < len(some) < 140
    assert {p.key for p in some} < {p.key for p in many}


def test_a_limit_counts_records_of_each_file_and_draws_the_same_again(tmp_path: Path) -> None:
    files = [PromptFile(lines(tmp_path / f"{n}.jsonl", [{"prompt": f"{n} {i}"} for i in range(50)])) for n in "ab"]
    first, counts = read_prompts(files, limit=10)
    assert (counts.records, len(first)) == (20, 20)
    again, _ = read_prompts(files, limit=10)
    assert [p.key for p in first] == [p.key for p in again]


def test_a_prompt_beyond_the_limit_of_characters_is_left_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"prompt": "x" * 100}, {"prompt": "short"}])
    prompts, counts = read_prompts([PromptFile(path)], max_characters=50)
    assert ([p.messages[0]["content"] for p in prompts], counts.too_long) == (["short"], 1)


def test_a_prompt_that_shares_thirteen_words_with_an_evaluation_prompt_is_left_out(tmp_path: Path) -> None:
    exclusion = Exclusion()
    exclusion.add(WORDS)
    run = WORDS.split()[2:15]
    assert exclusion.hits("Before it " + " ".join(run).upper().replace(" ", ",  ") + " and after")
    assert not exclusion.hits("Before it " + " ".join(run[:12]) + " and after")


def test_a_short_evaluation_prompt_excludes_only_itself() -> None:
    exclusion = Exclusion()
    exclusion.add("Name a prime number.")
    assert exclusion.hits("name a prime number")
    assert not exclusion.hits("name a prime number above ten")


@pytest.mark.parametrize(
    "record",
    [
        {"question": WORDS, "answer": "no"},
        {"prompt": WORDS},
        {"turns": ["other", WORDS]},
        {"messages": [user(WORDS), answer("b")]},
        {"Body": WORDS, "Question": "How many?"},
        {"strange": WORDS},
    ],
    ids=str,
)
def test_evaluation_files_of_any_form_are_understood(record: dict[str, Any], tmp_path: Path) -> None:
    exclusion = read_exclusion([lines(tmp_path / "e.jsonl", [record])])
    prompts, counts = read_prompts(
        [PromptFile(lines(tmp_path / "p.jsonl", [{"prompt": "So: " + WORDS}, {"prompt": "fine"}]))], exclusion=exclusion
    )
    assert ([p.messages[0]["content"] for p in prompts], counts.excluded) == (["fine"], 1)


def test_an_assistants_words_exclude_nothing(tmp_path: Path) -> None:
    exclusion = read_exclusion([lines(tmp_path / "e.jsonl", [{"messages": [user("hi"), answer(WORDS)]}])])
    assert not exclusion.hits(WORDS)


def test_keys_are_of_the_text_alone() -> None:
    assert prompt_key([user("Hi  there")]) == prompt_key([user("hi there")])
    assert len({prompt_key([user("hi")], copy) for copy in range(5)}) == 5
    assert prompt_key([user("a")]) != prompt_key([{"role": "system", "content": "a"}])


def test_paths_are_files_folders_and_weights(tmp_path: Path) -> None:
    one, two = (lines(tmp_path / name, [{"prompt": "a"}]) for name in ("a.jsonl", "b.jsonl.gz"))
    (tmp_path / "notes.txt").write_text("no prompts")
    assert expand([str(tmp_path)]) == [PromptFile(one), PromptFile(two)]
    assert expand([f"{one}=2.5", str(two)]) == [PromptFile(one, 2.5), PromptFile(two)]


@pytest.mark.parametrize("text", ["nowhere.jsonl", "{folder}/empty", "{folder}/a.jsonl=0", "{folder}/a.jsonl=-1"])
def test_a_path_that_cannot_be_used_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lines(tmp_path / "a.jsonl", [{"prompt": "a"}])
    with pytest.raises(ConfigError):
        expand([text.format(folder=tmp_path)])


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_prompts([PromptFile(tmp_path / "a.jsonl")])


# ---------------------------------------------------------------------- loops


@pytest.mark.parametrize("period", [1, 2, 3, 7, 16, 40, 64])
def test_a_run_of_tokens_said_over_and_over_is_a_loop(period: int) -> None:
    ids = list(range(100, 200)) + list(range(period)) * max(4, -(-32 // period))
    assert tail_repeats(ids)
    assert is_looping(ids)
    assert not is_looping(ids[: 100 + 2 * period])


def test_a_loop_that_counts_is_a_loop() -> None:
    ids = [token for i in range(20) for token in (1000 + i, *range(20))]
    assert not tail_repeats(ids)
    assert is_looping(ids)


def test_ordinary_text_is_none() -> None:
    words = [(i * i * 31 + i // 3) % 97 for i in range(400)]
    assert not is_looping(words)
    assert not is_looping([])
    assert not is_looping([5] * 8)
