"""Answers on disk: shards of token sequences that the original model wrote, the training data of every later stage.

A shard holds `tokens` int32 [T] (sequences one after another: the rendered prompt, then the answer with its end-of-text
token if it ended), `lengths` and `prompt_lengths` int32 [D]. Our own writer adds `keys` int64 [D], which prompt each
answers, and `skipped` int64 [S], prompts whose answers were not worth keeping: a later run asks for neither again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from linocut.engine.errors import ConfigError

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """One sequence. `ended`: it ends with its end-of-text token; else it was cut."""

    key: int
    prompt: Sequence[int]
    tokens: Sequence[int]
    ended: bool


@dataclass(frozen=True)
class Answers:
    """Sequences one after another. tokens: int32 [T]; lengths, prompt_lengths: int32 [D]."""

    tokens: Ints
    lengths: Ints
    prompt_lengths: Ints

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Longs:
        """Where each sequence begins in `tokens`, int64 [D]."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @property
    def answer_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64) - self.prompt_lengths.sum(dtype=np.int64))

    def __iter__(self) -> Iterator[tuple[Ints, int]]:
        """Each sequence's ids and the length of its prompt."""
        for start, length, prompt in zip(self.starts, self.lengths, self.prompt_lengths, strict=True):
            yield self.tokens[start : start + length], int(prompt)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_paths(folder: Path) -> list[Path]:
    """The complete shards of a folder, in order. Numbers may be missing: several writers share them out."""
    return sorted(folder.glob("shard-*.safetensors"))


def next_shard_number(folder: Path) -> int:
    return max((int(path.stem.removeprefix("shard-")) for path in shard_paths(folder)), default=-1) + 1


def write_shard(path: Path, answers: Sequence[Answer], skipped: Sequence[int], metadata: dict[str, str]) -> None:
    """Write a shard; it appears under its name only when it is complete."""
    sequences = [np.fromiter((*answer.prompt, *answer.tokens), dtype=np.int32) for answer in answers]
    tensors = {
        "tokens": np.concatenate(sequences) if sequences else np.zeros(0, np.int32),
        "lengths": np.array([len(ids) for ids in sequences], dtype=np.int32),
        "prompt_lengths": np.array([len(answer.prompt) for answer in answers], dtype=np.int32),
        "keys": np.array([answer.key for answer in answers], dtype=np.int64),
        "skipped": np.array(skipped, dtype=np.int64),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def read_answers(folder: Path) -> Answers:
    """All shards of `folder` as one. Raises ConfigError."""
    parts: list[Answers] = []
    for path in shard_paths(folder):
        try:
            with safe_open(path, "np") as shard:
                part = Answers(*(shard.get_tensor(name) for name in ("tokens", "lengths", "prompt_lengths")))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is no shard of answers: {error}") from None
        if part.tokens.shape[0] != part.lengths.sum(dtype=np.int64) or len(part.lengths) != len(part.prompt_lengths):
            raise ConfigError(f"{path} contradicts itself: its lengths do not add up to its tokens")
        parts.append(part)
    if not any(len(part) for part in parts):
        raise ConfigError(f"{folder} holds no answers: `linocut convert generate` makes them")
    return Answers(
        np.concatenate([part.tokens for part in parts]).astype(np.int32, copy=False),
        np.concatenate([part.lengths for part in parts]).astype(np.int32, copy=False),
        np.concatenate([part.prompt_lengths for part in parts]).astype(np.int32, copy=False),
    )


def prompts_again(folders: Sequence[Path], limit: int | None, seed: int) -> dict[int, list[int]]:
    """The prompts of folders of answers as they stand in tokens, by a key (63 bits) of the tokens alone.

    No prompt occurs twice; `limit` of them are drawn by `seed`, in a random order. Raises ConfigError.
    """
    found: dict[int, list[int]] = {}
    for folder in folders:
        for ids, length in read_answers(folder):
            prompt = np.ascontiguousarray(ids[:length])
            digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
            found.setdefault(int.from_bytes(digest, "big") >> 1, prompt.tolist())
    order = np.random.default_rng(seed).permutation(np.array(sorted(found), dtype=np.int64))[:limit]
    return {key: found[key] for key in order.tolist()}


@dataclass
class Done:
    """What a folder of answers holds already. keys: prompts that were answered, or given up."""

    keys: set[int] = field(default_factory=set)
    answers: int = 0
    answer_tokens: int = 0
    models: set[str] = field(default_factory=set)
    damaged: list[Path] = field(default_factory=list)


def scan_answers(folder: Path) -> Done:
    """Look through the shards without reading their tokens; unreadable ones are listed, not raised."""
    done = Done()
    for path in shard_paths(folder):
        try:
            with safe_open(path, "np") as shard:
                names = set(shard.keys())
                lengths, prompts = shard.get_tensor("lengths"), shard.get_tensor("prompt_lengths")
                for name in {"keys", "skipped"} & names:
                    done.keys.update(shard.get_tensor(name).tolist())
                done.models.add((shard.metadata() or {}).get("model", ""))
        except (SafetensorError, OSError):
            done.damaged.append(path)
            continue
        done.answers += len(lengths)
        done.answer_tokens += int(lengths.sum(dtype=np.int64) - prompts.sum(dtype=np.int64))
    return done
