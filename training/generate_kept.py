"""Answers of a generating process that are worth keeping, on their way into its shards."""

from __future__ import annotations

from collections import Counter

from .answers import Answer, shard_path, write_shard
from .generate_messages import WorkerTask


class KeptAnswers:
    """Holds finished answers until they are written. tokens: how many are held, prompts included."""

    def __init__(self, task: WorkerTask, counts: Counter[str]) -> None:
        """counts: the worker's, kept up to date here for answers and for prompts that got none."""
        self._task, self._counts = task, counts
        self._shard = task.first_shard
        self._answers: list[Answer] = []
        self._skipped: list[int] = []
        self.tokens = 0

    def add(self, answer: Answer) -> None:
        self._answers.append(answer)
        self.tokens += len(answer.prompt) + len(answer.tokens)
        self._counts["answers"] += 1
        self._counts["answer tokens"] += len(answer.tokens)
        self._counts["truncated"] += not answer.ended

    def skip(self, key: int, why: str) -> None:
        """The prompt `key` gets no answer, in a later run neither. why: the name it is counted under."""
        self._skipped.append(key)
        self._counts[why] += 1

    def write(self, wait: bool) -> str | None:
        """Write a shard and return its name, None if there was nothing to write.

        Truncated answers beyond their share are dropped, or wait for more that end.
        """
        ready, rest = self._divide()
        if not wait:
            self._drop(rest)
            rest = []
        if not ready and not self._skipped:
            return None
        path = shard_path(self._task.out, self._shard)
        write_shard(path, ready, self._skipped, self._task.metadata)
        self._shard += self._task.stride
        self._answers, self._skipped = rest, []
        self.tokens = sum(len(answer.prompt) + len(answer.tokens) for answer in rest)
        return path.name

    def _divide(self) -> tuple[list[Answer], list[Answer]]:
        """What is held, and of it the latest truncated answers beyond their share of all that this worker has kept."""
        share, held = self._task.truncated_share, sum(not answer.ended for answer in self._answers)
        ended, written = self._counts["answers"] - self._counts["truncated"], self._counts["truncated"] - held
        room = held if share >= 1 else int(ended * share / (1 - share)) - written
        ready: list[Answer] = []
        rest: list[Answer] = []
        for answer in self._answers:
            room -= not answer.ended
            (ready if answer.ended or room >= 0 else rest).append(answer)
        return ready, rest

    def _drop(self, answers: list[Answer]) -> None:
        for answer in answers:
            self.skip(answer.key, "truncated dropped")
            self._counts["answers"] -= 1
            self._counts["truncated"] -= 1
            self._counts["answer tokens"] -= len(answer.tokens)
