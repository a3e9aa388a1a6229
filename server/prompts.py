"""From what a client sent to prompts in token ids. Long texts are encoded in a thread; the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from .api_errors import BadRequest
from .requests import Conversation, Message
from .tokenizer import Tokenizer

T = TypeVar("T")

_INLINE_CHARACTERS = 4096  # encoded within a millisecond or two
_KWARGS_DEPTH = 16


@dataclass(frozen=True)
class Prompt:
    """ids, and the client's text if it sent text."""

    ids: list[int]
    text: str | None = None


class PromptBuilder:
    """Applies one model's tokenizer; without a tokenizer only token ids pass.

    needs_prompt: whether a completion's prompt must hold something.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        mask_id: int | None,
        threads: int = 2,
        needs_prompt: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._mask_id = mask_id
        self._needs_prompt = needs_prompt
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def require_tokenizer(self, param: str) -> Tokenizer:
        if self._tokenizer is None:
            raise BadRequest("this model has no tokenizer; send token ids to /v1/completions", param=param)
        return self._tokenizer

    async def chat(self, conversation: Conversation) -> Prompt:
        """The conversation under the chat template. Raises 400."""
        size = sum(map(_size, conversation.messages)) + _characters(conversation.chat_template_kwargs)
        return await self._offload(size, lambda: Prompt(self._encode_chat(conversation)))

    async def text(self, text: str, add_special_tokens: bool) -> Prompt:
        tokenizer = self.require_tokenizer("prompt")
        return await self._offload(len(text), lambda: Prompt(tokenizer.encode(text, add_special_tokens), text))

    async def decode(self, ids: list[int]) -> str:
        """The text of any ids, control tokens written out."""
        tokenizer = self.require_tokenizer("tokens")
        return await self._offload(len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=False))

    async def completion(self, prompt: str | list[Any], add_special_tokens: bool, limit: int) -> list[Prompt]:
        """The prompts of a completion request: a text, ids, or a list of either. Raises 400."""
        if not isinstance(prompt, str) and (not prompt or type(prompt[0]) is int):
            return [self._ids(prompt, "prompt")]
        items: list[Any] = [prompt] if isinstance(prompt, str) else prompt
        if len(items) > limit:
            raise BadRequest(f"at most {limit} prompts in one request", param="prompt")
        names = ["prompt"] if isinstance(prompt, str) else [f"prompt[{number}]" for number in range(len(items))]

        def encode() -> list[Prompt]:
            return [self._one(item, add_special_tokens, param) for item, param in zip(items, names, strict=True)]

        return await self._offload(sum(len(item) for item in items if isinstance(item, str)), encode)

    async def suffix(self, suffix: str | list[int], context: str) -> list[int]:
        """The ids that follow the generated text. Raises 400, also where the model could not see them."""
        if not suffix:
            return []
        if context != "full":
            why = f"this model does not see what follows its text ({context} attention); suffix needs full attention"
            raise BadRequest(why, param="suffix", code="unsupported_parameter")
        if isinstance(suffix, list):
            return self._ids(suffix, "suffix").ids
        tokenizer = self.require_tokenizer("suffix")
        return await self._offload(len(suffix), lambda: tokenizer.encode(suffix, False))

    def _one(self, item: Any, add_special_tokens: bool, param: str) -> Prompt:
        if isinstance(item, list):
            return self._ids(item, param)
        if not isinstance(item, str):
            raise BadRequest("a list of prompts holds texts or lists of token ids", param=param)
        ids = self.require_tokenizer("prompt").encode(item, add_special_tokens)
        if not ids and self._needs_prompt:
            raise BadRequest("the prompt is empty", param=param)
        return Prompt(ids, item)

    def _ids(self, ids: list[Any], param: str) -> Prompt:
        if not ids and self._needs_prompt:
            raise BadRequest("the prompt is empty", param=param)
        if not all(type(token) is int for token in ids):
            raise BadRequest("token ids and texts cannot be mixed in one prompt", param=param)
        if any(token >= self._vocab_size for token in ids):
            raise BadRequest(f"a token id is below {self._vocab_size}", param=param)
        return Prompt(ids)

    def _encode_chat(self, conversation: Conversation) -> list[int]:
        tokenizer = self.require_tokenizer("messages")
        if tokenizer.template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        continue_final = bool(conversation.continue_final_message)
        add_generation = conversation.add_generation_prompt
        if continue_final and add_generation:
            why = "continue_final_message and add_generation_prompt exclude each other"
            raise BadRequest(why, param="continue_final_message")
        hidden: list[str] = []

        def hide(text: str) -> str:
            return tokenizer.control.hide(text, hidden)

        messages = []
        for number, message in enumerate(conversation.messages):
            messages.append(_plain(message, f"messages[{number}]", hide, tokenizer.template.knows_developer))
        kwargs = dict(_hide_all(conversation.chat_template_kwargs or {}, hide, 0))
        if conversation.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", conversation.reasoning_effort)
        if add_generation is None:
            add_generation = not continue_final
        rendered = tokenizer.template.render(messages, add_generation, continue_final, kwargs)
        ids = tokenizer.control.encode(rendered, hidden)
        if not ids:
            raise BadRequest("the chat template makes an empty prompt of these messages", param="messages")
        if self._mask_id in ids:
            raise BadRequest("the chat template puts the mask token into the prompt", param="messages")
        return ids

    async def _offload(self, size: int, work: Callable[[], T]) -> T:
        if size <= _INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _size(message: Message) -> int:
    """Characters of everything that a template may put into the prompt."""
    content = message.content
    size = sum(len(part.text or "") for part in content) if isinstance(content, list) else len(content or "")
    return size + sum(len(getattr(message, name) or "") for name in ("name", "reasoning_content", "tool_call_id"))


def _characters(value: Any, depth: int = 0) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict) and depth < _KWARGS_DEPTH:
        return sum(len(key) + _characters(item, depth + 1) for key, item in value.items())
    if isinstance(value, list) and depth < _KWARGS_DEPTH:
        return sum(_characters(item, depth + 1) for item in value)
    return 1


def _plain(message: Message, param: str, hide: Callable[[str], str], knows_developer: bool) -> dict[str, Any]:
    """A message as templates expect it: string content, a role they know. Raises 400 for what is not built."""
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            why = f"{name} is not supported by this server"
            raise BadRequest(why, param=f"{param}.{name}", code="unsupported_parameter")
    role = "system" if message.role == "developer" and not knows_developer else message.role
    plain: dict[str, Any] = {"role": role, "content": hide(_text(message, param))}
    for name in ("name", "reasoning_content", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = hide(value)
    return plain


def _text(message: Message, param: str) -> str:
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise BadRequest("the message has no content", param=f"{param}.content")
        return ""
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        where = f"{param}.content[{number}]"
        if part.type != "text":
            why = "only text parts are supported by this server"
            raise BadRequest(why, param=f"{where}.type", code="unsupported_parameter")
        if part.text is None:
            raise BadRequest("the part has no text", param=f"{where}.text")
    return "\n".join(part.text or "" for part in content)


def _hide_all(value: Any, hide: Callable[[str], str], depth: int) -> Any:
    if depth > _KWARGS_DEPTH:
        raise BadRequest("nested too deeply", param="chat_template_kwargs")
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hide(key): _hide_all(item, hide, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide_all(item, hide, depth + 1) for item in value]
    return value
