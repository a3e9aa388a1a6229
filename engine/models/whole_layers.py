"""The decoder's layers as one call, where a kernel has all that they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from linocut.kernels.backend import Backend
from linocut.kernels.layers_native import NativeLayer, NativeLayers, Projection

from .adapter import Adapter
from .backbone import Backbone
from .linear import NativeInt8Linear, NativeLinear

if TYPE_CHECKING:
    from .decoder import Layer


def whole_layers(layers: list[Layer], backbone: Backbone, table: Tensor, backend: Backend) -> NativeLayers | None:
    """None where a layer does something else: experts, weights that are no values of float16, heads of odd sizes."""
    if backend != "native" or backbone.head_dim % 16:
        return None
    found = []
    for layer in layers:
        qkv, output, gate_up, down = map(_weights, (layer.qkv, layer.output, layer.gate_up, layer.down))
        if qkv is None or output is None or gate_up is None or down is None:
            return None
        heads = layer.qk_norm
        of_q, of_k = (None, None) if heads is None else (heads.query, heads.key)
        found.append(NativeLayer(layer.input_norm, layer.post_norm, of_q, of_k, qkv, output, gate_up, down))
    b = backbone
    return NativeLayers(found, heads=b.heads, kv_heads=b.kv_heads, size=b.head_dim, table=table, eps=b.norm_eps)


def _weights(projection: object) -> Projection | None:
    if isinstance(projection, Adapter):
        return projection.native()
    return (projection.weight, None, None) if isinstance(projection, NativeInt8Linear | NativeLinear) else None
