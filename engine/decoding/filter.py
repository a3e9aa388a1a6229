"""Learn2PD's filter: a small network that tells from a block's confidences which proposals are right."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ModelError

FILE = "filter.safetensors"


class Filter:
    """[rows, W] confidences -> [rows, W] logits. w1: [hidden, L], b1: [hidden], w2: [L, hidden], b2: [L], float32.

    A window longer than L is filtered in pieces of that length, a shorter one is padded with zeros.
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        if w2.shape != w1.T.shape or b1.shape != w1.shape[:1] or b2.shape != w2.shape[:1]:
            raise ModelError(f"{FILE}: the shapes of w1, b1, w2 and b2 do not belong together")
        self.w1, self.b1, self.w2, self.b2 = w1, b1, w2, b2

    def to(self, device: torch.device) -> Filter:
        return Filter(*(tensor.to(device) for tensor in (self.w1, self.b1, self.w2, self.b2)))

    @property
    def length(self) -> int:
        return self.w1.shape[1]

    def __call__(self, confidence: Tensor) -> Tensor:
        rows, width = confidence.shape
        pieces = pad(confidence, (0, -width % self.length)).view(rows, -1, 1, self.length)
        # Each output by its own sum: a product of matrices may add a row up otherwise beside other rows.
        hidden = torch.relu((pieces * self.w1).sum(-1) + self.b1)
        logits = (hidden[:, :, None, :] * self.w2).sum(-1) + self.b2
        return logits.view(rows, -1)[:, :width]


def read_filter(folder: Path, device: torch.device) -> Filter | None:
    """The filter of a model folder, None where there is none. Raises ModelError for a broken one."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        w1, b1, w2, b2 = (tensors[name].float().to(device) for name in ("w1", "b1", "w2", "b2"))
    except (SafetensorError, OSError, KeyError) as error:
        raise ModelError(f"{path} is no filter: {error}") from None
    return Filter(w1, b1, w2, b2)
