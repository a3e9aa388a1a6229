"""The draft head: ranks a mask's proposals anew once the token before them is known.

Masks propose all drafts of a segment at once and independently. The head, a small network over a mask's hidden state
and the token before its target, couples them (cf. the sampler head of arXiv 2507.11851, section 3.3).
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from linocut.kernels.backend import Backend
from linocut.kernels.draft_native import NativeDrafts, tables_are_native

from ..errors import ConfigError
from ..parallel.vocabulary import VocabShare
from .adapter import Weights
from .linear import Linear, NativeInt8Linear, NativeLinear, pack_linear


class DraftHead:
    """u = h + output · silu(input · [h ; e]), e the embedding of the token before, at unit RMS; scores are E · u."""

    def __init__(
        self,
        inputs: Tensor,
        outputs: Tensor,
        words: Tensor,
        head: Tensor,
        share: VocabShare,
        backend: Backend,
        mode: Literal["none", "int8"] = "none",
    ) -> None:
        """inputs: [hidden, 2 * hidden], outputs: [hidden, hidden]; words, head: the embedding and the vocabulary head,
        [width of the share, hidden]."""
        self._inputs = pack_linear(inputs, None, mode, backend)
        self._outputs = pack_linear(outputs, None, mode, backend)
        self._words, self._head = words, head
        self._share = share
        # Candidates are guesses, for which a CPU reads half of the bytes: drafts are verified by exact rows.
        self._quick: Linear | None = None
        if head.device.type == "cpu" and backend != "native":
            with contextlib.suppress(ConfigError):
                self._quick = pack_linear(head, None, "int8")
        # Whole greedy drafts in one call, where all that the head consists of is made for the kernels in C.
        self.native: NativeDrafts | None = None
        layers = self._inputs, self._outputs
        if share.ranks.size == 1 and backend == "native" and tables_are_native(words, head):
            one, two = (f.weight if isinstance(f, NativeLinear | NativeInt8Linear) else None for f in layers)
            if one is not None and two is not None:
                self.native = NativeDrafts(one, two, words, head)

    def quick_logits(self, normed: Tensor) -> Tensor | None:
        """[rows, hidden] -> about what the head says of the share's ids, [rows, width]; None: it is no quicker."""
        return None if self._quick is None else self._share.fill(self._quick(normed))

    def scores(self, hidden: Tensor, last: Tensor, candidates: Tensor) -> Tensor:
        """hidden: [rows, hidden], final-normed; last: [rows] ids; candidates: [rows, K] ids. Returns [rows, K]."""
        return self.among(hidden, self.refined(self.beside(hidden, last)), candidates)

    def beside(self, hidden: Tensor, last: Tensor) -> Tensor:
        """[h ; e], [rows, 2 * hidden]."""
        before = self._share.embed(last, self._words).float()
        before = before * torch.rsqrt(before.square().mean(-1, keepdim=True).clamp_min(1e-12))
        return torch.cat([hidden, before.to(hidden.dtype)], 1)

    def refined(self, beside: Tensor) -> Tensor:
        """What is added to h, [rows, hidden]."""
        return self._outputs(silu(self._inputs(beside)))

    def among(self, hidden: Tensor, refined: Tensor, candidates: Tensor) -> Tensor:
        """E · u of the candidates, [rows, K]."""
        return self._share.scores(hidden + refined, candidates, self._head)


def read_draft_head(
    weights: Weights,
    hidden: int,
    words: Tensor,
    head: Tensor,
    share: VocabShare,
    backend: Backend,
    mode: Literal["none", "int8"] = "none",
) -> DraftHead:
    """Raises ModelError if a tensor is missing."""
    inputs = weights.get("draft_head.input", (hidden, 2 * hidden))
    return DraftHead(inputs, weights.get("draft_head.output", (hidden, hidden)), words, head, share, backend, mode)
