"""Keeps the text of control tokens in a client's text from becoming control tokens.

A chat template writes control tokens as text, and so can a user: `<|im_end|>` typed into a message must reach the
model as those ten characters. Prompts without such text take the plain path. Otherwise:

1. In the client's texts every occurrence is replaced by a word that nobody can guess, and the template is rendered.
   The template works on the text as usual: it trims, splits and compares it.
2. Control tokens found now are the template's own. Each is replaced by an unguessable alias, and then the words of step
   1 by what they stood for.
3. A copy of the tokenizer, in which control tokens go by their aliases, encodes the whole in one pass. All other text
   is then tokenised as on the plain path, merges across the template's and the client's text included.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterable
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from .api_errors import BadRequest

_RESERVED = "the text holds control tokens of this model in a form that cannot be encoded as plain text"


class ControlText:
    """`control` ids come from templates only; `forbidden` ones (mask, banned) not even from a completion's prompt."""

    def __init__(self, backend: Backend, control: Iterable[int], forbidden: Iterable[int]) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._forbidden = frozenset(forbidden)
        self._control = {i: added[i].content for i in {*control, *self._forbidden} if i in added}
        self._ids = {content: i for i, content in self._control.items()}
        nonce = secrets.token_hex(8)
        # Letters and digits only: templates pass words through, and no pre-tokenizer or normalizer sees an alias.
        self._aliases = {content: f"A{nonce}n{i}e" for content, i in self._ids.items()}
        self._word = f"W{nonce}n"
        self._words = re.compile(f"{self._word}([0-9]+)e")
        self._pattern = _any_of(self._ids)
        self._normalizes = backend.normalizer is not None and any(added[i].normalized for i in self._control)
        self._aliased: Backend | None = None
        self._lock = threading.Lock()

    def hide(self, text: str, hidden: list[str]) -> str:
        """`text` with its control tokens replaced by words; what they stand for is appended to `hidden`."""

        def replace(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"{self._word}{len(hidden) - 1}e"

        text = self._pattern.sub(replace, text)
        if self._normalizes and self._yields(text, self._control):
            raise BadRequest(_RESERVED)  # seen only after normalization, e.g. written in full-width letters
        return text

    def encode(self, text: str, hidden: list[str]) -> list[int]:
        """Ids of a rendered template whose client texts went through `hide`."""
        if not hidden:
            return _encode(self._backend, text).ids
        text = self._pattern.sub(lambda match: self._aliases[match.group()], text)
        text = self._words.sub(lambda match: hidden[int(match[1])], text)
        if self._word.lower() in text.lower():  # the template changed a word's letters
            raise BadRequest(_RESERVED)
        return self._encode_aliased(text).ids

    def encode_prompt(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a completion's prompt: control tokens are allowed in it, forbidden ones come out as plain text."""
        encoding = _encode(self._backend, text)
        if not self._forbidden.isdisjoint(encoding.ids):

            def alias(match: re.Match[str]) -> str:
                content = match.group()
                return content if self._ids[content] in self._forbidden else self._aliases[content]

            encoding = self._encode_aliased(self._pattern.sub(alias, text))
            if not self._forbidden.isdisjoint(encoding.ids):
                raise BadRequest(_RESERVED, param="prompt")
        if add_special_tokens:
            encoding = self._backend.post_process(encoding, add_special_tokens=True)
        return encoding.ids

    def _yields(self, text: str, ids: Iterable[int]) -> bool:
        return not set(ids).isdisjoint(_encode(self._backend, text).ids)

    def _encode_aliased(self, text: str) -> Encoding:
        with self._lock:  # made on first need: few prompts hold such text, and the copy takes time and memory
            if self._aliased is None:
                self._aliased = self._make_aliased()
        return _encode(self._aliased, text)

    def _make_aliased(self) -> Backend:
        spec = json.loads(self._backend.to_str())
        for token in spec["added_tokens"]:
            if token["content"] in self._aliases:
                token.update(content=self._aliases[token["content"]], normalized=False, single_word=False)
        # The model's own vocabulary is renamed too, so that ids stay as they are and the old name cannot be reached.
        model = spec["model"]
        if model.get("unk_token") in self._aliases:
            model["unk_token"] = self._aliases[model["unk_token"]]
        model["vocab"] = _renamed(model["vocab"], self._aliases)
        spec["post_processor"] = None
        aliased = Backend.from_str(json.dumps(spec))
        assert all(aliased.token_to_id(alias) == self._ids[content] for content, alias in self._aliases.items())
        return aliased


def _encode(backend: Backend, text: str) -> Encoding:
    # Of the tokenizer's methods only the batch ones release the GIL, without which a thread is of no use.
    return backend.encode_batch_fast([text], add_special_tokens=False)[0]


def _renamed(vocab: Any, names: dict[str, str]) -> Any:
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
        return {names.get(token, token): i for token, i in vocab.items()}
    return [[names.get(token, token), score] for token, score in vocab]  # Unigram


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")
