"""Which part of a checkpoint's tensors a rank holds.

Queries, keys, values, gates and ups are cut by rows, so that a rank has whole heads and whole intermediate features;
what reads these, by columns, so that the ranks' results sum to the layer's (Megatron-LM, arXiv 1909.08053, section 3).
Of a mixture of experts every rank has a part of each expert: routing is the same everywhere, and so is the load.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.backbone import Backbone
from ..models.names import NamedWeights
from .ranks import Ranks
from .vocabulary import VocabShare

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def check_split(backbone: Backbone, size: int) -> None:
    """Raise ConfigError where `size` ranks cannot hold equal parts of a layer."""
    experts = backbone.experts
    divided = {
        "key-value heads": backbone.kv_heads,
        "attention heads": backbone.heads,
        "intermediate features": backbone.intermediate,
        "intermediate features of an expert": experts.intermediate if experts else 0,
        "intermediate features of the shared experts": experts.shared_intermediate if experts else 0,
    }
    for what, count in divided.items():
        if count % size:
            raise ConfigError(f"tensor_parallel_size {size} does not divide the model's {count} {what}")


def part_of(backbone: Backbone, size: int) -> Backbone:
    """The layers of one rank, as if they were a model's."""
    experts = backbone.experts
    return replace(
        backbone,
        heads=backbone.heads // size,
        kv_heads=backbone.kv_heads // size,
        intermediate=backbone.intermediate // size,
        experts=experts
        and replace(
            experts,
            intermediate=experts.intermediate // size,
            shared_intermediate=experts.shared_intermediate // size,
        ),
    )


class SplitWeights:
    """This rank's parts of tensors, asked for by Llama's names and their whole shapes."""

    def __init__(self, weights: NamedWeights, backbone: Backbone, share: VocabShare) -> None:
        self._weights, self._share, self._ranks = weights, share, share.ranks
        kv, inner = backbone.kv_heads * backbone.head_dim, backbone.intermediate
        # Rows of projections that stand packed in an adapter.
        self._packed = {"qkv_proj": (backbone.heads * backbone.head_dim, kv, kv), "gate_up_proj": (inner, inner)}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The part of the tensor of `shape` that is this rank's. Raises ModelError as the weights do."""
        if self._ranks.size == 1:
            return self._weights.get(name, shape)
        if name in _VOCABULARY:
            return self._vocabulary(name, shape)
        if ".adapter." in name:
            return self._adapter(name, shape)
        module, kind = name.split(".")[-2:]
        if module in _ROWS:
            return self._weights.get(name, shape, (_part(self._ranks, 0, shape[0]),))
        if module in _COLUMNS and kind == "weight":
            return self._weights.get(name, shape, (slice(None), _part(self._ranks, 0, shape[1])))
        found = self._weights.get(name, shape)
        # What is added to a sum over ranks counts once.
        return torch.zeros_like(found) if module in _COLUMNS and self._ranks.rank else found

    def _vocabulary(self, name: str, shape: tuple[int, ...]) -> Tensor:
        share = self._share
        held = self._weights.get(name, shape, (slice(share.start, share.start + share.held),))
        return torch.nn.functional.pad(held, (0, 0, 0, share.width - share.held))

    def _adapter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Of `up(down(x))` on whole `x`, the rows of `up`; on a part of `x`, the columns of `down`."""
        *_, module, _, matrix = name.split(".")
        if matrix == "down":
            columns = _part(self._ranks, 0, shape[1]) if module in _COLUMNS else slice(None)
            return self._weights.get(name, shape, (slice(None), columns))
        if module in _COLUMNS:
            return self._weights.get(name, shape)
        parts, first = [], 0
        for rows in self._packed[module]:
            parts.append(self._weights.get(name, shape, (_part(self._ranks, first, rows),)))
            first += rows
        return torch.cat(parts)


def _part(ranks: Ranks, first: int, count: int) -> slice:
    """This rank's of `count` rows from `first` on."""
    size = count // ranks.size
    return slice(first + ranks.rank * size, first + (ranks.rank + 1) * size)
