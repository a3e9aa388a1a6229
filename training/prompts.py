"""Prompts: records of messages in, conversations that wait for an answer out. Imports no torch."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from linocut.engine.errors import ConfigError

Message = dict[str, str]
Turns = Literal["last", "all"]

# A prompt that shares this many words in a row with an evaluation prompt is left out.
RUN = 13
# Where files of evaluation prompts keep their text; records without any of these count with all their texts.
_TEXT_FIELDS = ("messages", "prompt", "question", "instruction", "text", "input", "turns", "body", "problem")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class PromptFile:
    """JSON lines of records with `messages` or `prompt`, plain or gzip.

    weight: answers wanted of each prompt; 0.5 takes every second one, 3 asks for three.
    """

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A conversation whose last turn is the user's. Prompts of one text differ in `copy` and so in `key` (63 bits)."""

    key: int
    messages: list[Message]
    copy: int = 0


@dataclass
class PromptCounts:
    """Why records became no prompts."""

    records: int = 0
    unusable: int = 0  # no user turn, or not the form of a record
    too_long: int = 0
    duplicates: int = 0
    excluded: int = 0
    prompts: int = 0


@dataclass
class Exclusion:
    """Word runs of evaluation prompts. Those of fewer than RUN words are matched as a whole."""

    runs: set[int] = field(default_factory=set)
    wholes: set[int] = field(default_factory=set)

    def add(self, text: str) -> None:
        words = _words(text)
        if len(words) >= RUN:
            self.runs.update(_runs(words))
        elif words:
            self.wholes.add(hash(words))

    def hits(self, text: str) -> bool:
        words = _words(text)
        return hash(words) in self.wholes or not self.runs.isdisjoint(_runs(words))


def expand(paths: Iterable[str]) -> list[PromptFile]:
    """`PATH` or `PATH=WEIGHT`; a folder stands for its *.jsonl and *.jsonl.gz. Raises ConfigError."""
    files: list[PromptFile] = []
    for text in paths:
        name, separator, weight = text.rpartition("=")
        try:
            path, factor = (Path(name), float(weight)) if separator else (Path(text), 1.0)
        except ValueError:
            path, factor = Path(text), 1.0
        if not 0 < factor <= 1000:
            raise ConfigError(f"prompts {text!r}: a weight is a number above 0")
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
            if not found:
                raise ConfigError(f"{path} holds no *.jsonl and no *.jsonl.gz")
            files += [PromptFile(p, factor) for p in found]
        elif path.is_file():
            files.append(PromptFile(path, factor))
        else:
            raise ConfigError(f"prompts {text!r}: there is no such file or folder")
    return files


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises ConfigError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ConfigError(f"{path}, line {number}: not an object")
                    yield record
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON lines: {error}") from None


def read_exclusion(paths: Iterable[Path]) -> Exclusion:
    """What the prompts of evaluation files forbid."""
    exclusion = Exclusion()
    for path in paths:
        for record in read_records(path):
            for text in _texts(record):
                exclusion.add(text)
    return exclusion


def conversations(record: dict[str, Any], turns: Turns) -> list[list[Message]]:
    """The prompts of a record: all turns up to its last user turn, or up to each one. Empty if it has none."""
    messages = record.get("messages")
    if messages is None and isinstance(record.get("prompt"), str):
        messages = [{"role": "user", "content": record["prompt"]}]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return []
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    ends = [i + 1 for i, m in enumerate(plain) if m["role"] == "user" and m["content"].strip()]
    return [plain[:end] for end in (ends if turns == "all" else ends[-1:])]


def read_prompts(
    files: Iterable[PromptFile],
    *,
    exclusion: Exclusion | None = None,
    limit: int | None = None,
    turns: Turns = "last",
    max_characters: int = 20_000,
    seed: int = 0,
) -> tuple[list[Prompt], PromptCounts]:
    """The prompts of all files, shuffled, so that any beginning is a fair sample. No text occurs twice.

    limit: records taken of each file, drawn at random. max_characters: of a prompt, all turns together.
    Keys depend on texts alone. Raises ConfigError.
    """
    counts = PromptCounts()
    prompts: list[Prompt] = []
    seen: set[bytes] = set()
    for file in files:
        records = list(read_records(file.path))
        if limit is not None and len(records) > limit:
            records = random.Random(f"{seed}/{file.path.name}").sample(records, limit)
        for record in records:
            counts.records += 1
            found = conversations(record, turns)
            counts.unusable += not found
            for messages in found:
                prompts += _copies(messages, file.weight, seen, exclusion, max_characters, counts)
    counts.prompts = len(prompts)
    random.Random(seed).shuffle(prompts)
    return prompts, counts


def prompt_key(messages: list[Message], copy: int = 0) -> int:
    """63 bits that name a prompt and its copy, the same in every process."""
    return _number(_digest(messages), copy)


def fraction(key: int, purpose: str) -> float:
    """A number in [0, 1) drawn by `key`: decisions about a prompt hold whatever else is in the run."""
    digest = hashlib.blake2b(f"{purpose}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _copies(
    messages: list[Message],
    weight: float,
    seen: set[bytes],
    exclusion: Exclusion | None,
    max_characters: int,
    counts: PromptCounts,
) -> list[Prompt]:
    if sum(len(m["content"]) for m in messages) > max_characters:
        counts.too_long += 1
        return []
    digest = _digest(messages)
    if digest in seen:
        counts.duplicates += 1
        return []
    seen.add(digest)
    if exclusion is not None and any(exclusion.hits(m["content"]) for m in messages if m["role"] == "user"):
        counts.excluded += 1
        return []
    first = _number(digest, 0)
    number = int(weight) + (fraction(first, "weight") < weight % 1)
    return [Prompt(_number(digest, copy), messages, copy) for copy in range(number)]


def _digest(messages: list[Message]) -> bytes:
    """Case and white space do not make another prompt."""
    text = "\0".join(f"{m['role']}\1{' '.join(m['content'].lower().split())}" for m in messages)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _number(digest: bytes, copy: int) -> int:
    whole = hashlib.blake2b(digest + copy.to_bytes(4, "big"), digest_size=8).digest()
    return int.from_bytes(whole, "big") >> 1


def _texts(record: dict[str, Any]) -> list[str]:
    """The prompts of an evaluation record, whatever its form; of messages, the user's."""
    named = [value for key, value in record.items() if key.lower() in _TEXT_FIELDS]
    return [text for value in named or list(record.values()) for text in _strings(value)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    if isinstance(value, dict) and value.get("role", "user") == "user":
        return _strings(value["content"]) if "content" in value else _strings(list(value.values()))
    return []


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _runs(words: tuple[str, ...]) -> Iterator[int]:
    return (hash(words[i : i + RUN]) for i in range(len(words) - RUN + 1))
