"""Decoding as the families' papers write it down: one sequence, dense forwards, no cache, no batch, plain Python.

Fast-dLLM v2 (arXiv 2509.26328): blocks on a fixed grid, refined sub-block by sub-block, row p - 1 predicts p, and the
clean forward before a block decides its first position. SDAR: the same in place and without sub-blocks. Block size 1 of
a causal model is autoregressive decoding. Noise is keyed by (seed, choice, position, block step, vocabulary id).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from dense_oracle import dense_forward
from torch import Tensor

from linocut.engine.params import SamplingParams
from linocut.kernels.philox import gumbel_noise


def filtered(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution after temperature, then the top k, then the least prefix that reaches top_p, then min_p."""
    probability = torch.softmax(logits.double() / (sampling.temperature or 1.0), -1)
    value, order = probability.sort(descending=True, stable=True)
    keep = torch.ones(len(value), dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    share = value / value[keep].sum()
    keep &= (share.cumsum(0) - share < sampling.top_p) & (value >= sampling.min_p * value[0])
    return torch.zeros_like(probability).scatter(0, order[keep], value[keep] / value[keep].sum())


class NaiveDecoder:
    def __init__(self, folder: Path, *, block: int, sub_block: int, shifted: bool, mask: int | None) -> None:
        self.folder, self.block, self.sub_block, self.shifted, self.mask = folder, block, sub_block, shifted, mask

    def text(
        self, prompt: list[int], sampling: SamplingParams, strategy: str, choice: int = 0, **values: Any
    ) -> list[int]:
        """max_tokens tokens; stop ids are not looked for."""
        self.sampling, self.choice, self.values, self.strategy = sampling, choice, values, strategy
        tokens = list(prompt)
        while len(tokens) < len(prompt) + sampling.max_tokens:
            start = len(tokens) // self.block * self.block
            window: list[int | None] = [*tokens[start:], *[None] * (start + self.block - len(tokens))]
            tokens[start:] = self.filled(tokens[:start], window)
        return tokens[len(prompt) : len(prompt) + sampling.max_tokens]

    def filled(self, before: list[int], window: list[int | None]) -> list[int]:
        """The block `window` behind the final tokens `before`; None is undecided."""
        start = len(before)
        if self.shifted and window[0] is None:
            logits, _ = dense_forward(self.folder, before, self.block)
            window[0] = self.propose(logits[-1], start, 0)[0]
        step = 0
        while None in window:
            first = window.index(None) // self.sub_block * self.sub_block
            inside = range(first, min(first + self.sub_block, self.block))
            ids = before + [self.mask if token is None else token for token in window]
            logits, _ = dense_forward(self.folder, ids, self.block)
            proposed = {
                offset: self.propose(logits[start + offset - self.shifted], start + offset, step)
                for offset in inside
                if window[offset] is None
            }
            for offset in self.chosen({offset: confidence for offset, (_, confidence) in proposed.items()}, step):
                window[offset] = proposed[offset][0]
            step += 1
        return [token for token in window if token is not None]

    def propose(self, logits: Tensor, position: int, step: int) -> tuple[int, float]:
        """The token for a position, and how sure the model is of it."""
        logits = logits.clone()
        if self.mask is not None:
            logits[self.mask] = -torch.inf
        sampling = self.sampling
        after = filtered(logits, sampling)
        token = int(logits.argmax())
        if sampling.temperature:
            keys = [torch.tensor([value]) for value in (sampling.seed, self.choice, position, step)]
            perturbed = logits / sampling.temperature + gumbel_noise(*keys, 0, len(logits))[0]
            token = int(perturbed.masked_fill(after == 0, -torch.inf).argmax())
        if self.values.get("confidence") == "filtered":
            return token, float(after[token])
        return token, float(torch.softmax(logits.double() / (sampling.temperature or 1.0), -1)[token])

    def chosen(self, confidence: dict[int, float], step: int) -> list[int]:
        """Which of the candidates are committed in this step."""
        steps = self.values.get("denoising_steps") or self.block
        count = max(self.block // steps + (step < self.block % steps), 1)
        if self.values.get("order") == "sequential":
            first = min(confidence)
            return [offset for offset in confidence if offset < first + count]
        best = sorted(confidence, key=lambda offset: -confidence[offset])
        if self.strategy == "threshold":
            above = [offset for offset in best if confidence[offset] > self.values["threshold"]]
            if len(above) >= count:
                return above
        return best[:count]
