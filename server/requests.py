"""What clients send to the generating endpoints, as strict message types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .api_errors import BadRequest
from .body import convert
from .unsupported import CHAT, COMPLETIONS, NO_EFFECT, Neutral, UnknownFields, check_best_of, reject_unsupported

Count = Annotated[int, Meta(ge=1, le=2**31)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_IDS = 256


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that chat and completions share. None is "not given" everywhere."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Count | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    diffusion: dict[str, Any] | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings, without repetition. Raises 400."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise BadRequest(f"at most {MAX_STOPS} stop strings", param="stop")
        if not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise BadRequest(f"a stop string has 1 to {MAX_STOP_LENGTH} characters", param="stop")
        return tuple(dict.fromkeys(stops))


class TextPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """Messages and how the chat template is applied to them."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Meta(max_length=32, pattern="^[a-z]*$")] | None = None


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    """Everything of a chat request but its `Conversation` (a struct cannot inherit from two others)."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """prompt: a text, token ids, or a list of either. max_tokens: OpenAI's 16 unless given; null fills the context.

    suffix: what follows the generated text, as a text or token ids, for models that see it.
    """

    # msgspec takes one array type per union: the nesting is sorted out in prompts.py
    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Count | UnsetType | None = UNSET
    max_completion_tokens: Count | None = None
    suffix: str | list[TokenId] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeText(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation, frozen=True, kw_only=True):
    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[TokenId]
    model: str | None = None


G = TypeVar("G", bound=GenerateRequest)


def parse_chat(raw: dict[str, Any], unknown: UnknownFields) -> tuple[ChatRequest, Conversation]:
    request = _parse(raw, ChatRequest, CHAT, unknown, Conversation.__struct_fields__)
    return request, convert(raw, Conversation)


def parse_completion(raw: dict[str, Any], unknown: UnknownFields) -> CompletionRequest:
    return _parse(raw, CompletionRequest, COMPLETIONS, unknown)


def _parse(
    raw: dict[str, Any],
    kind: type[G],
    unsupported: Mapping[str, Neutral],
    unknown: UnknownFields,
    more_fields: tuple[str, ...] = (),
) -> G:
    reject_unsupported(raw, unsupported)
    request = convert(raw, kind)
    check_best_of(raw, request.n or 1)
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")
    known = {*kind.__struct_fields__, *more_fields, *unsupported, *NO_EFFECT, "best_of"}
    unknown.note(name for name in raw if name not in known and not name.startswith("guided_"))
    return request
