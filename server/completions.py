"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answer import Delta
from .delivery import deliver
from .generation import Generation
from .jobs import check_choices, make_job, new_id
from .prompts import Prompt
from .requests import CompletionRequest, parse_completion
from .service import Service, service_of

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    service = service_of(request)
    service.check_accepting()
    body = parse_completion(await service.read(request), service.unknown_fields)
    model = service.resolve_model(body.model)
    check_choices(body, 1, service)
    limit = service.settings.max_prompts
    prompts = await service.prompts.completion(body.prompt, body.add_special_tokens is not False, limit)
    check_choices(body, len(prompts), service)
    suffix = await service.prompts.suffix(body.suffix or "", service.model.context)
    job = make_job(new_id("cmpl"), body, prompts, service, "prompt", suffix)
    echoes = [_echo(prompt, body, service) for prompt in prompts] if body.echo else [""] * len(prompts)
    generation = service.generate(job)
    # Without a tokenizer token ids are all there is to answer with.
    with_ids = bool(body.return_token_ids) or service.tokenizer is None
    form = CompletionFormat(body, generation, model, echoes, with_ids)
    keep_alive = service.settings.keep_alive_seconds
    return await deliver(request, generation, form, service.metrics, bool(body.stream), keep_alive)


def _echo(prompt: Prompt, body: CompletionRequest, service: Service) -> str:
    if prompt.text is not None:
        return prompt.text
    return service.prompts.require_tokenizer("echo").decode(prompt.ids, body.skip_special_tokens is not False)


class CompletionFormat:
    """OpenAI's text_completion objects. echoes: the text each prompt's answers begin with."""

    def __init__(
        self, body: CompletionRequest, generation: Generation, model: str, echoes: list[str], with_ids: bool
    ) -> None:
        self._generation = generation
        self._echoes = echoes
        self._common = {
            "id": generation.job.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        options = body.stream_options
        self._final_usage = bool(options and options.include_usage)
        self._every_usage = bool(options and options.continuous_usage_stats)
        self._with_ids = with_ids
        self._started: set[int] = set()
        self._deltas: dict[int, Delta] = {}

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        first = delta.index not in self._started
        self._started.add(delta.index)
        text = self._echo(delta.index) + delta.text if first else delta.text
        if not text and delta.finish_reason is None and not (self._with_ids and delta.token_ids):
            return
        chunk = {**self._common, "choices": [self._choice(delta, text, first)]}
        if self._every_usage:
            chunk["usage"] = self._generation.usage()
        elif self._final_usage:
            chunk["usage"] = None
        yield chunk

    def usage_chunk(self) -> dict[str, Any] | None:
        if not self._final_usage:
            return None
        return {**self._common, "choices": [], "usage": self._generation.usage()}

    def add(self, delta: Delta) -> None:
        self._deltas.setdefault(delta.index, Delta(delta.index)).extend(delta)

    def body(self) -> dict[str, Any]:
        choices = [
            self._choice(delta, self._echo(index) + delta.text, True) for index, delta in sorted(self._deltas.items())
        ]
        return {**self._common, "choices": choices, "usage": self._generation.usage()}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._generation.job.n]

    def _choice(self, delta: Delta, text: str, first: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._with_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = self._generation.job.prompts[delta.index // self._generation.job.n].ids
        return choice
