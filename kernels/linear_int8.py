"""Products in integers: 8-bit activations, and weights of 4 or 8 bits."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from .linear_native import grid_levels, pack_grid
from .native import instructions, library, takes

GROUP = 32
# Outputs that are multiplied together: those of a register.
_PANEL = {"AVX2": 8, "AVX512": 16}


class _Int8Weight(ctypes.Structure):
    """`Int8Weight` of c/int8.h."""

    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("format", ctypes.c_int),
    ]


class Int8Weight:
    """float32 weights [out, in] packed for integer products, and their bias: [out] float32 or None.

    format: "codes4" where the weights are a 4-bit grid (GGUF's Q4_0 and Q4_1, rounded to float16), taken as it is;
    else "codes8": 8 bits and a scale for each output and 32 inputs, which a grid of 8 bits (Q8_0) loses nothing by.

    A row of x is quantised to 8 bits by groups of 32 inputs; its result is the same beside any other rows, bit for bit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        grid = pack_grid(weight)
        if grid is None:
            self.format, self._blocks = "codes8", _blocks8(*_quantize(weight))
        else:
            codes, scale, offset = grid_levels(*grid, self.outputs)
            four = grid[0] == "grid4"
            self.format = "codes4" if four else "codes8"
            self._blocks = _blocks4(codes, scale, offset) if four else _blocks8(codes, scale)
        self._bias = None if bias is None else bias.float().contiguous()
        self._structure = _Int8Weight(
            self._blocks.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            *(self.inputs, self.outputs, int(self.format == "codes8")),
        )
        self.at = ctypes.addressof(self._structure)

    def multiply(
        self, x: Tensor, adapter: tuple[Int8Weight, Int8Weight] | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """x @ weight.T + bias: [tokens, in], rows of any stride -> [tokens, out] float32.

        adapter: (down, up): (x @ down.T) @ up.T is added to `rows` ([count] int64). Raises MemoryError.
        """
        if not takes(x):
            x = x.float().contiguous()
        y = x.new_empty((x.shape[0], self.outputs))
        extra: tuple[int | None, int | None, int | None, int] = (None, None, None, 0)
        if adapter is not None and rows is not None:
            extra = adapter[0].at, adapter[1].at, rows.data_ptr(), rows.shape[0]
        if library().native_int8_linear(
            x.data_ptr(), x.stride(0), x.shape[0], self.at, *extra, y.data_ptr(), self.outputs
        ):
            raise MemoryError("a product in integers found no memory")
        return y


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, groups, 32] int8 and scales [out, groups] float32 of any weights; missing inputs are zeros."""
    groups = pad(weight, (0, -weight.shape[1] % GROUP)).view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(2).clamp_min(1e-30) / 127
    return (groups / scale[:, :, None]).round_().to(torch.int8), scale


def _panels(values: Tensor) -> Tensor:
    """[out, groups, ...] -> [panels, groups, ..., outputs of a panel], zeros for outputs that are missing."""
    outputs, panel = values.shape[0], _PANEL[instructions()]
    padded = torch.cat([values, values.new_zeros((-outputs % panel, *values.shape[1:]))])
    return padded.view(-1, panel, *values.shape[1:]).movedim(1, -1)


def _blocks4(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """What c/int8.h calls CODES4. codes: [out, groups, 32] of 0 to 15; scale, offset: [out, groups]."""
    # [panels, groups, eights, halves, fours, outputs]
    split = _panels(codes.view(*codes.shape[:2], 4, 2, 4)).to(torch.uint8)
    both = (split[:, :, :, 0] | split[:, :, :, 1] << 4).movedim(-1, -2)  # [panels, groups, eights, outputs, fours]
    numbers = [_panels(each).half().contiguous().view(torch.uint8) for each in (scale, offset)]
    return torch.cat([both.flatten(2), *numbers], dim=2).contiguous()


def _blocks8(codes: Tensor, scale: Tensor) -> Tensor:
    """What c/int8.h calls CODES8. codes: [out, groups, 32] of -127 to 127; scale: [out, groups]."""
    moved = _panels((codes.short() + 128).to(torch.uint8).view(*codes.shape[:2], 8, 4)).movedim(-1, -2)
    return torch.cat([moved.flatten(2), _panels(scale).contiguous().view(torch.uint8)], dim=2).contiguous()
