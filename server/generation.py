"""A call's prompts through the engine: submitted together, followed choice by choice, accounted for at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from linocut.engine.messages import AddRequest, ChoiceOutput
from linocut.engine.params import DecodingParams, SamplingParams

from .answer import Answer, AnswerRules, Delta
from .api_errors import BadRequest, InternalError, Unavailable
from .detokenizer import Decoder, Detokenizer
from .metrics import Metrics
from .prompts import Prompt
from .replicas import QueueFull, Replicas
from .submission import Submission


@dataclass(frozen=True)
class Job:
    """What one call asks of the engine: the prompts, each with its sampling, and n choices of each.

    suffix: ids that follow every choice's text.
    """

    id: str
    prompts: list[Prompt]
    sampling: list[SamplingParams]
    decoding: DecodingParams
    n: int
    rules: AnswerRules
    suffix: list[int] = field(default_factory=list)
    skip_special_tokens: bool = True
    salt: str = ""


class Generation:
    """Submitted on construction; `advance` it until it is `finished`. Close it in any case.

    Choice i of prompt p has index p * n + i. Raises 503 if the queue is full, 400 if it could never hold the call.
    """

    def __init__(self, job: Job, engine: Replicas, decoder: Decoder, metrics: Metrics, retry_after: int) -> None:
        self.job = job
        self.started = time.monotonic()
        self.first_text: float | None = None
        self._metrics = metrics
        self._last_text: dict[int, float] = {}
        self._first_text: dict[int, float] = {}
        self.answers = [
            Answer(index, Detokenizer(decoder, job.skip_special_tokens), job.rules)
            for index in range(len(job.prompts) * job.n)
        ]
        self._unfinished = len(self.answers)
        self._prompt_of = {f"{job.id}-{number}": number for number in range(len(job.prompts))}
        requests = [
            AddRequest(
                request_id=f"{job.id}-{number}",
                prompt=prompt.ids,
                sampling=job.sampling[number],
                decoding=job.decoding,
                n=job.n,
                suffix=job.suffix,
                salt=job.salt,
            )
            for number, prompt in enumerate(job.prompts)
        ]
        if len(self.answers) > engine.capacity:
            raise BadRequest(f"this server holds at most {engine.capacity} choices at a time", param="n")
        try:
            self._submission: Submission = engine.submit(requests)
        except QueueFull:
            metrics.rejected()
            raise Unavailable(
                "the server is at capacity; try again later",
                code="queue_full",
                headers={"Retry-After": str(retry_after)},
            ) from None
        for request in requests:
            metrics.submitted(len(request.prompt), job.decoding.strategy, job.n, request.sampling.max_tokens)

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    async def advance(self, timeout: float | None = None) -> list[Delta]:
        """News of the choices, at most one delta each; none after `timeout` seconds without any.

        Raises EngineDead, or 500 if the engine ends a choice by an error; the other choices are then aborted on close.
        """
        news: dict[int, Delta] = {}
        for output in await self._submission.take(timeout):
            answer = self.answers[self._prompt_of[output.request_id] * self.job.n + output.choice]
            if answer.finish_reason is not None:
                continue
            if output.finish_reason in ("error", "abort"):
                raise InternalError(f"generation failed: {output.error or output.finish_reason}")
            delta = answer.push(output)
            self._observe(answer, output)
            if answer.finish_reason is not None:
                self._unfinished -= 1
                self._submission.abort_choice(output.request_id, output.choice)
                now = time.monotonic()
                decoding = now - self._first_text.get(answer.index, now)
                forwards, prefilling = answer.forwards, output.prefill_seconds
                self._metrics.finished(answer.finish_reason, answer.tokens, forwards, prefilling, decoding)
            # Several steps that arrived together become one delta.
            news.setdefault(answer.index, Delta(answer.index)).extend(delta)
        return list(news.values())

    def close(self) -> None:
        self._submission.close()

    def _observe(self, answer: Answer, output: ChoiceOutput) -> None:
        if not output.token_ids:
            return
        now = time.monotonic()
        if self.first_text is None:
            self.first_text = now
            self._metrics.first_tokens(now - self.started)
        last = self._last_text.get(answer.index)
        if last is not None:
            self._metrics.chunk(now - last, len(output.token_ids))
        else:
            self._first_text[answer.index] = now
            # Choices share their prompt: the first one counts it.
            cached = 0 if output.choice else output.cached_tokens
            self._metrics.answering(output.queue_seconds, output.prefill_seconds, cached)
        self._last_text[answer.index] = now

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.job.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, of all choices together, with a `diffusion` part."""
        completion = self.completion_tokens
        forwards = sum(answer.forwards for answer in self.answers)
        n = self.job.n
        # Choices of one prompt share it: count what the best served of them found in the cache.
        cached = sum(
            max(answer.cached_tokens for answer in self.answers[start : start + n])
            for start in range(0, len(self.answers), n)
        )
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "diffusion": {
                "forwards": forwards,
                "tokens_per_forward": round(completion / forwards, 4) if forwards else 0.0,
                "positions": sum(answer.positions for answer in self.answers),
            },
        }
