"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answer import Delta
from .api_errors import BadRequest
from .delivery import deliver
from .generation import Generation
from .jobs import check_choices, make_job, new_id
from .requests import ChatRequest, parse_chat
from .service import service_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    service = service_of(request)
    service.check_accepting()
    body, conversation = parse_chat(await service.read(request), service.unknown_fields)
    model = service.resolve_model(body.model)
    if not service.chats:
        why = "this model fills a canvas and was not trained on conversations; use /v1/completions"
        raise BadRequest(why, param="messages")
    check_choices(body, 1, service)
    prompt = await service.prompts.chat(conversation)
    job = make_job(new_id("chatcmpl"), body, [prompt], service, "messages")
    generation = service.generate(job)
    form = ChatFormat(body, generation, model)
    keep_alive = service.settings.keep_alive_seconds
    return await deliver(request, generation, form, service.metrics, bool(body.stream), keep_alive)


class ChatFormat:
    """OpenAI's chat.completion and chat.completion.chunk objects."""

    def __init__(self, body: ChatRequest, generation: Generation, model: str) -> None:
        self._generation = generation
        self._common = {"id": generation.job.id, "created": int(time.time()), "model": model}
        options = body.stream_options
        self._final_usage = bool(options and options.include_usage)
        self._every_usage = bool(options and options.continuous_usage_stats)
        self._with_ids = bool(body.return_token_ids)
        self._started: set[int] = set()
        self._deltas: dict[int, Delta] = {}

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        index = delta.index
        if index not in self._started:
            chunk = self._chunk(index, {"role": "assistant", "content": ""})
            if self._with_ids and not self._started:
                chunk["prompt_token_ids"] = self._generation.job.prompts[0].ids
            self._started.add(index)
            yield chunk
        if delta.text or (self._with_ids and delta.token_ids):
            chunk = self._chunk(index, {"content": delta.text})
            if self._with_ids:
                chunk["choices"][0]["token_ids"] = delta.token_ids
            yield chunk
        if delta.finish_reason is not None:
            chunk = self._chunk(index, {})
            chunk["choices"][0] |= {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            yield chunk

    def usage_chunk(self) -> dict[str, Any] | None:
        if not self._final_usage:
            return None
        return {
            **self._common,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": self._generation.usage(),
        }

    def add(self, delta: Delta) -> None:
        self._deltas.setdefault(delta.index, Delta(delta.index)).extend(delta)

    def body(self) -> dict[str, Any]:
        choices = []
        for index, delta in sorted(self._deltas.items()):
            choice: dict[str, Any] = {
                "index": index,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": None,
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            if self._with_ids:
                choice["token_ids"] = delta.token_ids
            choices.append(choice)
        body = {
            **self._common,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._generation.usage(),
        }
        if self._with_ids:
            body["prompt_token_ids"] = self._generation.job.prompts[0].ids
        return body

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._common, "object": "chat.completion.chunk", "choices": [choice]}
        if self._every_usage:
            chunk["usage"] = self._generation.usage()
        elif self._final_usage:
            chunk["usage"] = None
        return chunk
