"""How likely the original model finds a text: its own teacher-forced pass in float32, through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # (prompt, answer), token ids


@dataclass(frozen=True)
class Verdict:
    """Of one answer. nll: nats, summed over its tokens. agreed: tokens that are the model's argmax."""

    nll: float
    agreed: int


class Judge:
    """The original model, on `device`. Its cost is one prefill of every pair that it has not met before."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self._device = device
        large = device.type == "cuda"
        # Positions of a forward, and rows of the head at a time: [rows, vocabulary] in float32 is the largest tensor.
        self._positions, self._rows = (32768, 4096) if large else (2048, 512)
        self._met: dict[Pair, Verdict] = {}

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One for each pair, in order."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._met and pair[1]]
        for batch in self._batches(new):
            self._met.update(zip(batch, self._judge(batch), strict=True))
        return [self._met[pair] if pair[1] else Verdict(0.0, 0) for pair in pairs]

    def _batches(self, pairs: list[Pair]) -> Iterator[list[Pair]]:
        """Of about equal lengths, so that little is padding."""
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]), reverse=True)
        while pairs:
            count = max(1, self._positions // (len(pairs[0][0]) + len(pairs[0][1])))
            yield pairs[:count]
            pairs = pairs[count:]

    @torch.inference_mode()
    def _judge(self, batch: list[Pair]) -> list[Verdict]:
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        # Padding stands behind the text and attention is causal, so no mask is needed.
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        asked = torch.zeros(len(batch), longest, dtype=torch.bool)  # rows that predict a token of the answer
        for row, (prompt, answer) in enumerate(batch):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            asked[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        targets = ids.roll(-1, dims=1)[asked].to(self._device)  # [rows]
        hidden = self._model.base_model(ids.to(self._device), use_cache=False).last_hidden_state
        hidden = hidden[asked.to(self._device)]  # [rows, hidden]
        scored = [
            self._score(hidden[i : i + self._rows], targets[i : i + self._rows])
            for i in range(0, len(targets), self._rows)
        ]
        nll, agreed = (torch.cat(parts).cpu() for parts in zip(*scored, strict=True))
        sizes = [len(answer) for _, answer in batch]
        return [
            Verdict(float(n.sum()), int(a.sum())) for n, a in zip(nll.split(sizes), agreed.split(sizes), strict=True)
        ]

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[rows] float64 negative log-likelihoods, [rows] bool agreements."""
        logits = self._model.get_output_embeddings()(hidden).float()  # [rows, vocabulary]
        chosen = logits.gather(1, targets[:, None])[:, 0]
        return (logits.logsumexp(dim=1) - chosen).double(), logits.argmax(dim=1) == targets
