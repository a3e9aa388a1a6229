"""A checkpoint's chat template: Jinja in a sandbox, with the helpers that templates on the hub count on.

Written beside transformers' own renderer because importing that imports torch, which the server process must not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from linocut.engine.errors import ModelError

from .api_errors import BadRequest, clip

# Names that a request's chat_template_kwargs may not set: they are ours, or the template's own helpers.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
_FINAL_TAG = "ContinueHereTag"


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would reach the model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """Raises ModelError if the template does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the checkpoint's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self.knows_developer = "developer" in source

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        continue_final: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        """The prompt's text. With `continue_final` it ends with the last message's content, left open. Raises 400."""
        if continue_final:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _FINAL_TAG}]
        for name in kwargs:
            if name in RESERVED or name in self._special_tokens:
                raise BadRequest(f"{clip(name)} cannot be set", param=f"chat_template_kwargs.{name}")
        try:
            text = self._template.render(
                **{
                    **self._special_tokens,
                    **kwargs,
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            why = f"the chat template refuses these messages: {clip(str(error), 150)}"
            raise BadRequest(why, param="messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            what = f"the chat template failed on these messages ({type(error).__name__})"
            raise BadRequest(what, param="messages") from None
        if continue_final:
            text, found, _ = text.rpartition(_FINAL_TAG)
            if not found:
                why = "the chat template does not show the final message; it cannot be continued"
                raise BadRequest(why, param="continue_final_message")
        return text
