"""All layers of a Llama in one call; what each of them does is that of the kernels in C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .linear_int8 import Int8Weight
from .linear_native import NativeWeight
from .native import library

if TYPE_CHECKING:
    from .attention import AttentionLayout

# A weight and, where there is an adapter beside it, its two halves: all for integers, or all for floats.
Weight = Int8Weight | NativeWeight
Projection = tuple[Weight, Weight | None, Weight | None]

_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Layer(ctypes.Structure):
    """`Layer` of c/layers.c: norms, then three pointers for integers and three for floats for each projection."""

    _fields_ = [("norms", _P * 4), ("projections", _P * 24)]


class _Layers(ctypes.Structure):
    """`Layers` there."""

    _fields_ = [
        ("layers", _P),
        *((name, _L) for name in ("count", "hidden", "intermediate", "heads", "kv_heads", "size")),
        *(("table", _P), ("half", _L), ("eps", _F), ("scale", _F)),
    ]


class _Rows(ctypes.Structure):
    """`Rows` there."""

    _fields_ = [
        *(("tokens", _L), ("positions", _P), ("slots", _P), ("page_size", _L)),
        *(("page_table", _P), ("table_stride", _L), ("rows", _L)),
        *((name, _P) for name in ("query_start", "visible", "scratch_start", "scratch_end")),
        *(("most", _L), ("noisy", _P), ("noisy_count", _L)),
    ]


@dataclass
class NativeLayer:
    """input_norm, post_norm: [hidden] float32; q_norm, k_norm: [size], or None."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Projection
    output: Projection
    gate_up: Projection
    down: Projection


class NativeLayers:
    """Layers that differ in their weights alone. table: of `rope_table`; size: of a head, a multiple of 16."""

    def __init__(
        self, layers: Sequence[NativeLayer], *, heads: int, kv_heads: int, size: int, table: Tensor, eps: float
    ) -> None:
        self._kept = layers, table
        self._layers = (_Layer * len(layers))()
        for at, layer in zip(self._layers, layers, strict=True):
            norms = layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm
            at.norms[:] = [None if norm is None else norm.data_ptr() for norm in norms]
            parts = [layer.qkv, layer.output, layer.gate_up, layer.down]
            at.projections[:] = [pointer for part in parts for pointer in _pointers(part)]
        first = layers[0]
        self._all = _Layers(
            *(ctypes.addressof(self._layers), len(layers), first.qkv[0].inputs, first.down[0].inputs),
            *(heads, kv_heads, size, table.data_ptr(), table.shape[1] // 2, eps, size**-0.5),
        )
        self._pointers = _P * len(layers)

    def run(
        self,
        residual: Tensor,
        positions: Tensor,
        slots: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        layout: AttentionLayout,
        noisy: Tensor | None,
    ) -> Tensor:
        """Embeddings ([tokens, hidden] float32) become, in place, the last layer's output.

        positions, slots: [tokens] int32. keys, values: of each layer, [pages, page_size, kv_heads, size] float32
        without gaps, pages of a power of two. noisy: [count] int64, rows that adapters act on. Raises MemoryError.
        """
        scratch: tuple[int | None, int | None] = (None, None)
        if layout.scratch_start is not None and layout.scratch_end is not None:
            scratch = layout.scratch_start.data_ptr(), layout.scratch_end.data_ptr()
        rows = _Rows(
            *(residual.shape[0], positions.data_ptr(), slots.data_ptr(), keys[0].shape[1]),
            *(layout.page_table.data_ptr(), layout.page_table.stride(0), layout.page_table.shape[0]),
            *(layout.query_start.data_ptr(), layout.visible.data_ptr(), *scratch, layout.max_visible),
            *((None, 0) if noisy is None else (noisy.data_ptr(), noisy.shape[0])),
        )
        caches = (self._pointers(*(each.data_ptr() for each in cache)) for cache in (keys, values))
        if library().native_layers(ctypes.byref(self._all), ctypes.byref(rows), *caches, residual.data_ptr()):
            raise MemoryError("a forward found no memory")
        return residual


def _pointers(projection: Projection) -> list[int | None]:
    """`Either` of c/layers.c."""
    found = [None if part is None else part.at for part in projection]
    return [*found, None, None, None] if isinstance(projection[0], Int8Weight) else [None, None, None, *found]
