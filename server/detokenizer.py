"""Text from tokens as they arrive: valid UTF-8 at every cut, constant work per token."""

from __future__ import annotations

from typing import Protocol

_REPLACEMENT = "\ufffd"
_CONTEXT = 6  # emitted tokens decoded again before new ones: decoders look at a token's neighbours
_LONGEST_CONTEXT = 16
_UNFINISHED = 3  # tokens that the bytes of an unfinished UTF-8 character can take
_LONGEST_PENDING = 64


class Decoder(Protocol):
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Emits the text of the tokens it has seen, up to the last place where no character is unfinished.

    A trailing replacement character may be the beginning of a character whose other bytes are still to come; so text
    is emitted only up to a token that leaves none at the end. (Byte-level decoders replace the unfinished character
    only, byte-fallback ones the whole run of bytes around it: hence cuts at tokens, not at characters.)
    """

    def __init__(self, decoder: Decoder, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, ids: list[int]) -> str:
        if not ids:
            return ""
        self._pending += ids
        for size in range(len(self._pending), max(len(self._pending) - _UNFINISHED, 1) - 1, -1):
            text = self._decode(self._context + self._pending[:size])
            if not text.endswith(_REPLACEMENT):
                return self._emit(size, text)
        if len(self._pending) > _LONGEST_PENDING:
            return self._emit_invalid()
        return ""

    def flush(self) -> str:
        """The withheld rest, replacement characters included, once no more tokens can come."""
        return self._emit(len(self._pending), self._decode(self._context + self._pending))

    def _emit(self, size: int, text: str) -> str:
        """Move `size` pending tokens to the context; `text` is what both together decode to."""
        delta = text[len(self._context_text) :]
        context = self._context + self._pending[:size]
        del self._pending[:size]
        if len(context) > _CONTEXT:
            # Begin at a character's boundary if one is near: half a character may spoil what follows it.
            for length in range(_CONTEXT, min(_LONGEST_CONTEXT, len(context)) + 1):
                text = self._decode(context[-length:])
                if not text.startswith(_REPLACEMENT):
                    break
            context = context[-length:]
        self._context, self._context_text = context, text
        return delta

    def _emit_invalid(self) -> str:
        """A long run that is no UTF-8: emit most of it, so that the work stays linear."""
        whole = self._decode(self._context + self._pending)
        last = len(self._pending) - _UNFINISHED - 1
        for size in range(last, last - _LONGEST_CONTEXT, -1):
            text = self._decode(self._context + self._pending[:size])
            if text + self._decode(self._pending[size:]) == whole:  # no character lies across this cut
                return self._emit(size, text)
        return self._emit(last, self._decode(self._context + self._pending[:last]))

    def _decode(self, ids: list[int]) -> str:
        return self._decoder.decode(ids, self._skip)
