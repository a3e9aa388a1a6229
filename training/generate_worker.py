"""What a generating process does: takes prompts from a queue, keeps its engine full, writes shards of answers."""

from __future__ import annotations

import gc
import queue
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linocut.engine.errors import ModelError

from .answers import Answer
from .generate_kept import KeptAnswers
from .generate_messages import Flag, Job, Jobs, Reports, WorkerReport, WorkerTask, answer_temperature
from .looping import is_looping, tail_repeats
from .prompts import Exclusion, prompt_key, read_exclusion

# Tokens between looks at a running answer for a loop. A loop found early frees its place in the batch.
LOOK = 64
# Seconds between reports to the parent.
REPORT = 0.5
# An answer that the deadline cuts must have this many tokens to be worth its place.
LEAST = 16
# Seconds that finished answers are held in memory at most.
FLUSH = 60.0
SELF_PROMPT_TOKENS = 256


@dataclass
class _Running:
    job: Job
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)


class Worker:
    """Feeds an EngineCore in bursts and collects its answers."""

    def __init__(self, task: WorkerTask, jobs: Jobs, reports: Reports, stop: Flag) -> None:
        from linocut.engine.decoding.parameters import resolve
        from linocut.engine.llm import LLM

        self.task, self._jobs, self._reports, self._stop = task, jobs, reports, stop
        llm = LLM(task.model, **_engine_config(task))
        self.core = llm.core
        self.tokenizer = llm.tokenizer
        if not self.tokenizer.chat_template:
            raise ModelError(f"{task.model} has no chat template: prompts cannot be put to it")
        self._decoding = resolve(self.core.info, task.diffusion)
        self._places = self.core.info.max_running
        self._prompt_limit = self.core.info.max_model_len - task.max_tokens
        # Admissions copy some thirty small tensors to the device and make one eager forward of many positions:
        # some at a time, most steps are pure decoding, which replays a graph.
        self._burst = max(self._places // 16, 1)
        self._ready: deque[_Running] = deque()
        self._running: dict[str, _Running] = {}
        self._exhausted = False
        self._header: list[int] | None = None
        self._exclusion: Exclusion | None = None
        self._user_turns: set[int] = set()
        self._name = 0
        self.counts: Counter[str] = Counter()
        self._kept = KeptAnswers(task, self.counts)
        self._reported = self._flushed = time.monotonic()

    def report(self, kind: str, text: str = "") -> None:
        self.counts["forwards"] = self.core.stats().forwards
        self._reports.put(WorkerReport(self.task.index, kind, text, dict(self.counts)))

    def run(self) -> None:
        if self.task.own_process:
            # Steps make thousands of short-lived objects without cycles; looking for some costs a fifth of a step.
            gc.collect()
            gc.freeze()
            gc.disable()
        try:
            while not self._stop.is_set():
                self._refill()
                if self.core.busy:
                    self._step()
                elif self._exhausted and not self._ready:
                    break
                self._tell()
            self._cut()
        finally:  # answers that are finished outlive whatever happened
            self._flush()

    # ---------------------------------------------------------------- prompts in

    def _refill(self) -> None:
        free = self._places - len(self._running)
        if free < self._burst and self._running:
            return
        while len(self._ready) < free and not self._exhausted:
            try:
                jobs = self._jobs.get(block=not self._running and not self._ready, timeout=0.2)
            except queue.Empty:
                break
            if jobs is None:
                self._exhausted = True
            else:
                self._prepare(jobs)
        for _ in range(min(free, len(self._ready))):
            self._start(self._ready.popleft())

    def _prepare(self, jobs: list[Job]) -> None:
        """Render and tokenise a batch of jobs."""
        rendered: list[tuple[Job, str]] = []
        for job in jobs:
            if job.asks_itself:
                self._ready.append(_Running(job, self._user_header()))
                continue
            if job.ids is not None:
                self._admit(job, job.ids)
                continue
            try:
                text = self.tokenizer.apply_chat_template(job.messages, add_generation_prompt=True, tokenize=False)
            except Exception:  # templates raise what they like, on roles that do not alternate for instance
                self._skip(job, "refused")
                continue
            rendered.append((job, text))
        if not rendered:
            return
        batch = self.tokenizer([text for _, text in rendered], add_special_tokens=False)["input_ids"]
        for (job, _), ids in zip(rendered, batch, strict=True):
            self._admit(job, list(ids))

    def _admit(self, job: Job, ids: list[int]) -> None:
        if not 0 < len(ids) <= self._prompt_limit:
            self._skip(job, "prompt too long")
        else:
            self._ready.append(_Running(job, ids))

    def _start(self, running: _Running) -> None:
        from linocut.engine.messages import AddRequest
        from linocut.engine.params import SamplingParams

        job = running.job
        room = self.core.info.max_model_len - len(running.prompt)
        tokens = min(SELF_PROMPT_TOKENS, room) if job.asks_itself else self.task.max_tokens
        # The seed is the prompt's own, so that an answer does not depend on what else is in the run.
        sampling = SamplingParams(max_tokens=tokens, temperature=job.temperature, seed=job.key ^ self.task.seed)
        name = str(self._name)
        self._name += 1
        self.core.add(AddRequest(request_id=name, prompt=running.prompt, sampling=sampling, decoding=self._decoding))
        self._running[name] = running

    def _user_header(self) -> list[int]:
        """The template's beginning up to where a user's text would stand."""
        if self._header is None:
            mark = "\u2042mark\u2042"
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
            self._header = self.tokenizer.encode(text.partition(mark)[0], add_special_tokens=False)
            if mark not in text or not self._header:
                raise ModelError("this chat template has no header before a user's text: self-prompts need one")
        return self._header

    # ---------------------------------------------------------------- answers out

    def _step(self) -> None:
        for output in self.core.step():
            running = self._running[output.request_id]
            tokens = running.tokens
            looked = len(tokens) // LOOK
            tokens += output.token_ids
            if output.finish_reason is not None:
                del self._running[output.request_id]
                self.counts["finished tokens"] += len(tokens)
                self.counts["finished forwards"] += output.forwards
                self._finish(running, output.finish_reason == "stop")
            elif len(tokens) // LOOK > looked and tail_repeats(tokens):
                from linocut.engine.messages import Abort

                self.core.abort(Abort(request_id=output.request_id))
                del self._running[output.request_id]
                self._skip(running.job, "looping")

    def _finish(self, running: _Running, ended: bool) -> None:
        tokens = running.tokens
        if is_looping(tokens[:-1] if ended else tokens):
            self._skip(running.job, "looping")
        elif running.job.asks_itself:
            self._ask_itself(running.job, tokens, ended)
        elif ended and len(tokens) < 2:
            self._skip(running.job, "empty")
        else:
            self._keep(Answer(running.job.key, running.prompt, tokens, ended))

    def _ask_itself(self, job: Job, tokens: list[int], ended: bool) -> None:
        """Put the user's turn that the model wrote to the model."""
        text = self.tokenizer.decode(tokens[:-1], skip_special_tokens=True).strip()
        messages = [{"role": "user", "content": text}]
        known = prompt_key(messages)
        if self._exclusion is None:
            self._exclusion = read_exclusion(self.task.exclude)
        if not ended or len(text) < 8 or known in self._user_turns or self._exclusion.hits(text):
            self._skip(job, "self-prompt unusable")
            return
        self._user_turns.add(known)
        self._prepare([Job(job.key, messages, answer_temperature(job.key, self.task.metadata))])

    def _keep(self, answer: Answer) -> None:
        self._kept.add(answer)
        if self._kept.tokens >= self.task.shard_tokens:
            self._flush()

    def _skip(self, job: Job, why: str) -> None:
        self._kept.skip(job.key, why)

    def _cut(self) -> None:
        """The end came first: the beginnings of answers are the model's words too."""
        for running in self._running.values():
            if not running.job.asks_itself and len(running.tokens) >= LEAST and not is_looping(running.tokens):
                self._keep(Answer(running.job.key, running.prompt, running.tokens, False))

    def _flush(self, wait: bool = False) -> None:
        self._flushed = time.monotonic()
        if name := self._kept.write(wait):
            self.report("shard", name)
        if self.task.own_process:
            gc.collect(1)

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._reported < REPORT:
            return
        self._reported = now
        self.report("progress")
        if now - self._flushed >= FLUSH:
            self._flush(wait=True)
        if self.task.own_process and _orphaned():
            raise ModelError("the parent process has gone")


def _orphaned() -> bool:
    import multiprocessing

    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def _engine_config(task: WorkerTask) -> dict[str, Any]:
    """The engine's settings, with this worker's share of the device's memory for its K/V pages."""
    config = {"max_model_len": task.prompt_limit + task.max_tokens, **task.engine}
    # Hardly any prefix is shared, and without looking for one a step does less.
    config.setdefault("prefix_caching", False)
    if config.get("device") == "cuda" and "kv_memory" not in config:
        import torch

        total = torch.cuda.mem_get_info()[1]
        weights = sum(path.stat().st_size for path in Path(task.model).glob("*.safetensors"))
        # Beside weights: the CUDA context, graphs, activations of the largest forward, logits.
        room = int(total * task.share) - weights - (3 << 30)
        if room < 1 << 28:
            raise ModelError(f"a process's share of the GPU leaves {room >> 20} MiB for K/V: ask for fewer processes")
        config["kv_memory"] = room
    return config
