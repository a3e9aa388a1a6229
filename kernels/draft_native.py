"""Drafts of a draft head in C: the greedy ones, one behind the other, of all rows in one call."""

from __future__ import annotations

import ctypes

from torch import Tensor

from .linear_int8 import Int8Weight
from .linear_native import NativeWeight
from .native import library, takes

_P, _L = ctypes.c_void_p, ctypes.c_long
# What `native_draft` returns.
_NO_MEMORY, _NO_SUCH_ID = 1, 2


class _Layer(ctypes.Structure):
    """`Layer` of c/draft.c."""

    _fields_ = [("integers", _P), ("floats", _P)]


class _DraftHead(ctypes.Structure):
    """`DraftHead` there."""

    _fields_ = [("inputs", _Layer), ("outputs", _Layer), ("words", _P), ("head", _P), ("vocab", _L), ("hidden", _L)]


class NativeDrafts:
    """The head of `engine/models/draft_head.py`: u = h + outputs · silu(inputs · [h ; e]), scores are head · u.

    inputs: [hidden, 2 * hidden]; outputs: [hidden, hidden]; words, head: [vocab, hidden] float32 without gaps, what
    e (at unit RMS) and the candidates' scores are read from. A row's drafts are the same beside any other rows, bit for
    bit.
    """

    def __init__(
        self, inputs: NativeWeight | Int8Weight, outputs: NativeWeight | Int8Weight, words: Tensor, head: Tensor
    ) -> None:
        self._kept = inputs, outputs, words, head
        self._structure = _DraftHead(
            *(_layer(inputs), _layer(outputs), words.data_ptr(), head.data_ptr(), *words.shape),
        )
        self._at = ctypes.addressof(self._structure)

    def run(self, normed: Tensor, top: Tensor, covered: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The best candidate of every mask given the one before it, and its probability: [rows, masks] both.

        normed: [rows * masks, hidden] float32; top: [rows * masks, K] int64, candidates; covered: [rows * masks]
        float32, their probability; none of them with gaps. last: [rows] ids that stand before the first masks. Ties go
        to the first candidate; a probability that is no number is 0. Raises IndexError for a last id that is none of
        the vocabulary, and MemoryError.
        """
        rows = last.shape[0]
        token = top.new_empty((rows, top.shape[0] // max(rows, 1)))
        confidence = covered.new_empty(token.shape)
        last = last.long().contiguous()
        failed = library().native_draft(
            *(self._at, normed.data_ptr(), top.data_ptr(), covered.data_ptr(), *token.shape, top.shape[1]),
            *(last.data_ptr(), token.data_ptr(), confidence.data_ptr()),
        )
        if failed == _NO_MEMORY:
            raise MemoryError("drafts found no memory")
        if failed == _NO_SUCH_ID:
            raise IndexError("a draft stands behind an id that the vocabulary does not have")
        return token, confidence


def tables_are_native(words: Tensor, head: Tensor) -> bool:
    """Whether the kernel takes these."""
    return takes(words, head) and words.is_contiguous() and head.is_contiguous()


def _layer(weight: NativeWeight | Int8Weight) -> _Layer:
    if isinstance(weight, Int8Weight):
        return _Layer(weight.at, None)
    return _Layer(None, weight.at)
