"""Products with weights kept in the few bits that they came with."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .native import library, takes

# Of linear.c, fewest bits first. A grid is a checkpoint that was quantised before it was rounded to float16: groups of
# 32 inputs with 16 levels (GGUF's Q4_0 and Q4_1), or with 255 around zero (Q8_0).
_FORMATS = {"grid4": 1, "grid8": 2, "half": 0}
# Four rows of weights, expanded to float32, are on a thread's stack.
MOST_INPUTS = 16384
# A grid is looked for in as many outputs first.
_SAMPLE = 8


class _FloatWeight(ctypes.Structure):
    """`FloatWeight` of c/native.h."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("format", ctypes.c_int),
    ]


class NativeWeight:
    """Packed float32 weights [out, in] that are values of float16, every one of them, and their bias: [out] or None.

    format: "grid4", "grid8", "half". at: where the kernels find all this described. Products are float32; a row's
    result is the same beside any other rows, bit for bit, in every format.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        packed = pack_grid(weight) or ("half", _pack("half", weight.contiguous()))
        assert packed[1] is not None  # "half" takes any
        self.format, self._packed = packed
        self._code = _FORMATS[self.format]
        self._bias = None if bias is None else bias.float().contiguous()
        self._pointers = packed[1].data_ptr(), None if self._bias is None else self._bias.data_ptr()
        self._structure = _FloatWeight(*self._pointers, self.inputs, self.outputs, self._code)
        self.at, self._multiply = ctypes.addressof(self._structure), library().native_linear

    def multiply(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [rows, in] -> [rows, out]."""
        if not takes(x):
            x = x.float().contiguous()
        y, (packed, bias) = x.new_empty((x.shape[0], self.outputs)), self._pointers
        self._multiply(
            *(x.data_ptr(), x.stride(0), x.shape[0], packed, self._code, self.inputs, self.outputs),
            *(bias, y.data_ptr(), self.outputs, 0),
        )
        return y

    def add_low_rank(self, down: NativeWeight, x: Tensor, y: Tensor, rows: slice) -> None:
        """y += (x @ down.T) @ weight.T in place, on `rows`: [tokens, in], [tokens, out], rows of any stride."""
        if not takes(x):
            x = x.float().contiguous()
        first, count = rows.start, rows.stop - rows.start
        if library().native_low_rank(
            *(x.data_ptr() + 4 * first * x.stride(0), x.stride(0), count),
            *(down._pointers[0], down._code, self._pointers[0], self._code),
            *(down.inputs, self.inputs, self.outputs, y.data_ptr() + 4 * first * y.stride(0), y.stride(0)),
        ):
            raise MemoryError("a low-rank product found no memory")


def pack_grid(weight: Tensor) -> tuple[str, Tensor] | None:
    """("grid4" or "grid8", packed bytes) of float32 weights [out, in] that are such a grid, every bit of them."""
    weight = weight.contiguous()
    for name in ("grid4", "grid8"):
        if _pack(name, weight[:_SAMPLE]) is not None and (packed := _pack(name, weight)) is not None:
            return name, packed
    return None


def grid_levels(name: str, packed: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack_grid` packed: codes [out, groups, 32] int8, scale and offset [out, groups] float32."""
    if name == "grid4":
        groups = packed.view(outputs, -1, 24)
        codes = torch.cat([groups[:, :, :16] & 15, groups[:, :, :16] >> 4], dim=2).view(torch.int8)
    else:
        groups = packed.view(outputs, -1, 36)
        codes = groups[:, :, :32].contiguous().view(torch.int8)
    numbers = groups[:, :, -8:].contiguous().view(torch.float32)
    if name == "grid4":
        return codes, numbers[:, :, 0], numbers[:, :, 1]
    return codes, numbers[:, :, 1], torch.zeros_like(numbers[:, :, 1])


def _pack(name: str, weight: Tensor) -> Tensor | None:
    """None where the format does not hold it exactly."""
    outputs, inputs = weight.shape
    code = _FORMATS[name]
    packed = torch.empty(library().native_packed_bytes(code, inputs, outputs), dtype=torch.uint8)
    held = library().native_pack(code, weight.data_ptr(), inputs, outputs, packed.data_ptr())
    return packed if held else None
