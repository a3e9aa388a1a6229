"""Stage 1, generate: the original model answers prompts through our own engine. Its words are what conversion learns.

One parent reads and hands out prompts; processes on every device answer them (`generate_worker`). Python work of one
process overlaps the device work of the others. Answers land in shards (`answers`), and a later run continues with the
prompts that no shard mentions.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linocut.engine.errors import ConfigError, ModelError

from .answers import Done, prompts_again, scan_answers
from .generate_log import GenerateLog
from .generate_messages import Job, WorkerReport, answer_temperature
from .generate_processes import GRACE, workers
from .generate_settings import GenerateSettings
from .generate_tasks import answer_metadata, worker_tasks
from .prompts import fraction, read_exclusion, read_prompts

# Prompts handed to a worker at a time: tokenised together while its engine waits.
CHUNK = 256
SUMMARY = "generate.json"


@dataclass(frozen=True)
class GenerateSummary:
    """What a folder of answers holds after a run, and what the run did. ended: prompts, seconds, tokens or stopped."""

    answers: int
    answer_tokens: int
    seconds: float
    tokens_per_second: float
    ended: str
    counts: dict[str, int]


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of the last run that came to its end, None if there was none."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def generate(settings: GenerateSettings) -> GenerateSummary:
    """Answer the prompts that `settings.out` has no answers to, until they, the time or the tokens run out.

    SIGINT and SIGTERM end it with what there is ("stopped"). Raises ConfigError for prompts or a folder that cannot be
    used, ModelError if a process failed: what was answered is kept, and another call goes on.
    """
    began = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    done = scan_answers(settings.out)
    model = settings.model.resolve().name
    if done.models - {model, ""}:
        raise ConfigError(f"{settings.out} holds answers of {', '.join(sorted(done.models))}, not of {model}")
    for path in done.damaged:
        path.unlink()
    (settings.out / SUMMARY).unlink(missing_ok=True)
    with GenerateLog(settings.out / "generate.jsonl", settings.progress) as log:
        log.event("start", settings=_plain(settings), answers=done.answers, answer_tokens=done.answer_tokens)
        run = _Run(settings, model, done, log, began)
        with _terminable():
            summary = run.run()
        log.event("end", **asdict(summary))
    if summary.ended == "stopped":
        return summary
    if run.failures:
        failed = f"{len(run.failures)} of {len(run.tasks)} generating processes failed ({run.failures[0]})"
        raise ModelError(f"{failed}: {summary.answers} answers are kept, the same command again goes on")
    (settings.out / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM means what Ctrl-C does. Only a main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """The workers of one run, and what they have reported."""

    def __init__(self, settings: GenerateSettings, model: str, done: Done, log: GenerateLog, began: float) -> None:
        self.settings, self.done, self.log, self.began = settings, done, log, began
        self.tasks = worker_tasks(settings, model)
        self.counts: dict[int, Counter[str]] = {}
        self.open = {task.index for task in self.tasks}
        self.failures: list[str] = []
        self.ended = "prompts"
        self.dropped: Counter[str] = Counter()

    def run(self) -> GenerateSummary:
        with workers(self.tasks) as self.workers:
            try:
                # Engines load while the prompts are read.
                self._hand_out()
                while self.open and not self._over():
                    self._listen(0.2)
            except KeyboardInterrupt:
                self.ended = "stopped"
                self.workers.stop.set()
            deadline = time.monotonic() + GRACE
            while self.open and time.monotonic() < deadline:
                self._listen(0.2)
        # Those that did not end in time are ended, with what they hold.
        self.failures += [f"process {worker} did not end" for worker in sorted(self.open)]
        if len(self.failures) == len(self.tasks) and self.ended != "stopped":
            raise ModelError(f"no process could generate: {self.failures[0]}")
        total = self._total() + Counter({"failed processes": len(self.failures)})
        seconds = time.monotonic() - self.began
        return GenerateSummary(
            answers=self.done.answers + total["answers"],
            answer_tokens=self.done.answer_tokens + total["answer tokens"],
            seconds=round(seconds, 2),
            tokens_per_second=round(total["answer tokens"] / seconds, 1),
            ended=self.ended,
            counts=dict(total + self.dropped),
        )

    def _hand_out(self) -> None:
        todo = self._jobs()
        self.log.expect(len(todo), self.done.answer_tokens)
        chunk = max(min(CHUNK, len(todo) // (2 * len(self.tasks))), 1)
        batches: list[list[Job] | None] = [todo[i : i + chunk] for i in range(0, len(todo), chunk)]
        for batch in [*batches, *[None] * len(self.tasks)]:
            while self.open and not self._over():
                try:
                    self.workers.jobs.put(batch, timeout=0.2)
                    break
                except queue.Full:
                    self._listen(0.0)
            self._listen(0.0)

    def _jobs(self) -> list[Job]:
        """What is still to be answered, in an order that makes any beginning a fair sample."""
        settings, known = self.settings, self.done.keys
        mixing = answer_metadata(settings, "")
        prompts, counts = read_prompts(
            settings.prompts,
            exclusion=read_exclusion(settings.exclude) if settings.exclude else None,
            limit=settings.limit,
            turns=settings.turns,
            max_characters=8 * settings.prompt_limit,
            seed=settings.seed,
        )
        self.dropped = Counter({f"prompts {name}": value for name, value in asdict(counts).items()})
        jobs = [
            # A second answer to the same prompt would be the same one again if it were greedy too.
            Job(p.key, p.messages, settings.temperature if p.copy else answer_temperature(p.key, mixing))
            for p in prompts
            if p.key not in known
        ]
        again = prompts_again(settings.prompts_of, settings.limit, settings.seed)
        jobs += [Job(k, None, answer_temperature(k, mixing), ids) for k, ids in again.items() if k not in known]
        own = [_self_key(settings.seed, index) for index in range(settings.self_prompts)]
        jobs += [Job(key, None, 1.0) for key in own if key not in known]
        if bool(own) + bool(prompts) + bool(again) > 1:
            jobs.sort(key=lambda job: fraction(job.key, f"order/{settings.seed}"))
        answered = len(prompts) + len(again) + len(own) - len(jobs)
        self.log.event("prompts", todo=len(jobs), answered=answered, **asdict(counts))
        return jobs

    def _listen(self, timeout: float) -> None:
        """Take in what the workers report; wait `timeout` seconds for the first report."""
        reports = self.workers.reports
        try:
            report: WorkerReport = reports.get(timeout=timeout) if timeout else reports.get_nowait()
        except queue.Empty:
            self._look_for_dead()
            return
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(report)
                report = reports.get_nowait()
        total = self._total()
        self.log.progress(total, time.monotonic() - self.began)

    def _take(self, report: WorkerReport) -> None:
        if report.counts:
            self.counts[report.worker] = Counter(report.counts)
        if report.kind in ("done", "failed"):
            self.open.discard(report.worker)
        if report.kind == "failed":
            self.failures.append(report.text)
        if report.kind != "progress":
            self.log.event(report.kind, worker=report.worker, text=report.text, **report.counts)

    def _look_for_dead(self) -> None:
        dead = [index for index in self.open if self.workers.is_dead(index)]
        if not dead:
            return
        # The last words of a process may still be on their way.
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(self.workers.reports.get(timeout=0.5))
        for worker in self.open.intersection(dead):
            self.open.discard(worker)
            self.failures.append(f"process {worker} died")
            self.log.event("failed", worker=worker, text="the process died")

    def _over(self) -> bool:
        """Whether time or tokens have run out; tells the workers."""
        settings = self.settings
        if settings.max_seconds is not None and time.monotonic() - self.began >= settings.max_seconds:
            self.ended = "seconds"
        elif settings.answer_tokens is not None and self._held() >= settings.answer_tokens:
            self.ended = "tokens"
        else:
            return False
        self.workers.stop.set()
        return True

    def _held(self) -> int:
        return self.done.answer_tokens + self._total()["answer tokens"]

    def _total(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())


def _self_key(seed: int, index: int) -> int:
    return int(fraction(index, f"self/{seed}") * 2**52) << 11 | (index & 0x7FF)


def _plain(settings: GenerateSettings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return plain
