"""Fields of OpenAI's and vLLM's requests that are not built: a value that asks for nothing passes, others are 400."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .api_errors import BadRequest, clip

log = logging.getLogger(__name__)

Neutral = Callable[[Any], bool]


def _empty(value: Any) -> bool:
    return value in ([], {}, "")


def _off(value: Any) -> bool:
    return value is False


def _on(value: Any) -> bool:
    return value is True


def _never(value: Any) -> bool:
    return False


def _number(neutral: int) -> Neutral:
    return lambda value: type(value) in (int, float) and value == neutral


def _one_of(*values: Any) -> Neutral:
    return lambda value: any(type(value) is type(known) and value == known for known in values)


# name -> which values ask for nothing; null always does.
COMMON: Mapping[str, Neutral] = {
    "presence_penalty": _number(0),
    "frequency_penalty": _number(0),
    "repetition_penalty": _number(1),
    "length_penalty": _number(1),
    "logit_bias": _empty,
    "use_beam_search": _off,
    "early_stopping": _off,
    "structured_outputs": _empty,
    "structural_tag": _never,
    "response_format": _one_of({"type": "text"}),
    "logits_processors": _empty,
    "prompt_logprobs": _never,
    "allowed_token_ids": _never,
    "bad_words": _empty,
    "truncate_prompt_tokens": _never,
    "return_tokens_as_token_ids": _off,
    "spaces_between_special_tokens": _on,
    "priority": _number(0),
    "vllm_xargs": _empty,
    "kv_transfer_params": _empty,
}

CHAT: Mapping[str, Neutral] = {
    **COMMON,
    "tools": _empty,
    "tool_choice": _one_of("none", "auto"),
    "functions": _empty,
    "function_call": _one_of("none", "auto"),
    "logprobs": _off,
    "top_logprobs": _number(0),
    "prediction": _never,
    "modalities": _one_of([], ["text"]),
    "audio": _never,
    "web_search_options": _never,
    "documents": _empty,
    "chat_template": _never,
    "echo": _off,
    "add_special_tokens": _off,
    "include_reasoning": _on,
    "mm_processor_kwargs": _empty,
    "media_io_kwargs": _empty,
}

COMPLETIONS: Mapping[str, Neutral] = {
    **COMMON,
    "logprobs": _off,
    "prompt_embeds": _never,
}

# Fields that by their nature change nothing in the answer.
NO_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
        "moderation",
        "parallel_tool_calls",
    }
)


def reject_unsupported(raw: Mapping[str, Any], table: Mapping[str, Neutral]) -> None:
    """Raise 400 naming the first field of `raw` that asks for something not built."""
    for name, value in raw.items():
        neutral = table.get(name)
        if neutral is None and name.startswith("guided_"):
            neutral = _empty
        if neutral is not None and value is not None and not neutral(value):
            raise BadRequest(f"{clip(name)} is not supported by this server", param=name, code="unsupported_parameter")


def check_best_of(raw: Mapping[str, Any], n: int) -> None:
    best_of = raw.get("best_of")
    if best_of is not None and (type(best_of) is not int or not 1 <= best_of <= n):
        why = "best_of beyond n is not supported by this server"
        raise BadRequest(why, param="best_of", code="unsupported_parameter")


class UnknownFields:
    """Logs each unknown field name once in the life of the process; remembers a bounded number of them."""

    def __init__(self, limit: int = 256) -> None:
        self._seen: set[str] = set()
        self._limit = limit

    def note(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self._seen) >= self._limit:
                return
            name = clip(name, 64)
            if name not in self._seen:
                self._seen.add(name)
                log.warning("ignoring unknown request field %r", name)
