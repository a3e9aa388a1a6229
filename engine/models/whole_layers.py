"""The decoder's layers as one call, where a kernel has all that they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.layers_int8 import Int8Layer, Int8Layers, Projection

from .adapter import Adapter
from .backbone import Backbone
from .linear import NativeInt8Linear

if TYPE_CHECKING:
    from .decoder import Layer


def whole_layers(layers: list[Layer], backbone: Backbone, table: Tensor, backend: Backend) -> Int8Layers | None:
    """None where a layer does something else: norms of heads, experts, products in float32, heads of odd sizes."""
    if backend != "native" or backbone.head_dim % 16:
        return None
    found = []
    for layer in layers:
        parts = [_integers(each) for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        qkv, output, gate_up, down = parts
        if layer.q_norm is not None or qkv is None or output is None or gate_up is None or down is None:
            return None
        found.append(Int8Layer(layer.input_norm, layer.post_norm, qkv, output, gate_up, down))
    b = backbone
    return Int8Layers(found, heads=b.heads, kv_heads=b.kv_heads, size=b.head_dim, table=table, eps=b.norm_eps)


def _integers(projection: object) -> Projection | None:
    if isinstance(projection, Adapter):
        return projection.integers()
    return (projection.weight, None, None) if isinstance(projection, NativeInt8Linear) else None
