"""Linear layers, packed once for the device they run on.

Measured (Zen 3, AVX2, two threads; SmolLM2-135M's 30 layers, all weights distinct; speed against F.linear in float32):

| rows | oneDNN | float16 weights | int8 |
|---|---|---|---|
| 1 | 1.5 | 1.9 | 2.3 |
| 4 | 2.3 | 4.4 | 4.1 |
| 16 | 1.5 | 2.3 | 2.7 |
| 64 | 1.1 | 1.4 | 2.0 |
| 256 | 1.0 | 1.1 | 1.6 |

(There "native" takes 10.4, 13.2, 19.7, 27.8 and 60.7 ms for 1, 4, 8, 12 and 32 rows, "native int8" 3.7, 4.3, 7.1, 9.0
and 21.4.)

Few rows are bound by reading the weights, so halving these counts for more than arithmetic. The same layers in ms of
CPU time on a Xeon with AVX-512 and AMX, one thread ("native": `kernels/linear_native.py`, four bits that lose nothing):

| rows | F.linear | oneDNN | float16 weights | int8 | bfloat16 (AMX) | native |
|---|---|---|---|---|---|---|
| 1 | 31 | 38 | 20 | 12 | 22 | 9 |
| 8 | 75 | 43 | 34 | 18 | 21 | 16 |
| 64 | 118 | 111 | 112 | 46 | 30 | 117 |

And on an AMD EPYC (Zen 4) with AVX512_VNNI, one thread ("native int8": `kernels/linear_int8.py`):

| rows | native | int8 | native int8 |
|---|---|---|---|
| 1 | 8.8 | 9.5 | 4.5 |
| 8 | 23.9 | 12.0 | 7.0 |
| 12 | 33.5 | 14.9 | 9.7 |
| 64 | 159 | 45.9 | 44.7 |

Rejected: weights stored transposed (0.6 to 1.9), MKL's packed format (0.6 to 1.9), weight-only int8
(`_weight_int8pack_mm`, 0.4 at best), weight-only int4 (`_weight_int4pack_mm_for_cpu`: 166 ms a row in float32, 6 in
bfloat16, which rounds scales), oneDNN's int8 with AMX (16 ms for one row, 18 for eight, with the quantising), and
float32 by AMX tiles of bfloat16, two parts of a weight and three of an input (15 ms became 20 for one row, 30 became 25
for eight, 774 became 365 for 256: as a row must be the same beside any others, one would have paid for many).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from linocut.kernels.backend import Backend
from linocut.kernels.linear_int8 import Int8Weight
from linocut.kernels.linear_native import MOST_INPUTS, NativeWeight
from linocut.kernels.native import multiplies_integers

from ..errors import ConfigError

Linear = Callable[[Tensor], Tensor]

# FBGEMM works through batches in slices of this many rows.
_SLICE = 120
# oneDNN gets at least this many.
_LEAST = 4


def pack_linear(
    weight: Tensor, bias: Tensor | None, mode: Literal["none", "int8"], backend: Backend = "torch"
) -> Linear:
    """The fastest form of `x @ weight.T + bias` for the device and dtype: [rows, in] -> [rows, out], same dtype.

    weight: [out, in], bias: [out] or None; neither is kept where a packed copy takes its place. Mode "none" is exact to
    the rounding of sums, and in float32 on an x86 CPU a row's result is the same, bit for bit, beside any other rows.
    Mode "int8" is approximate (see NativeInt8Linear, Int8Linear), a row its own too. Raises ConfigError where the
    machine has no int8 kernel.
    """
    on_cpu = weight.device.type == "cpu"
    if mode == "int8":
        if has_integers(mode, backend):
            return NativeInt8Linear(weight.float(), bias)
        if not (on_cpu and _has_fbgemm()):
            raise ConfigError("quantization int8 needs an x86 CPU with AVX2: use quantization none")
        return Int8Linear(weight, bias)
    native = backend == "native" and weight.shape[1] <= MOST_INPUTS
    if on_cpu and weight.dtype == torch.float32 and (native or _has_fbgemm()) and fits_float16(weight):
        return NativeLinear(weight, bias) if native else HalfLinear(weight, bias)
    if on_cpu and _has_onednn(weight.dtype):
        return OneDnnLinear(weight, bias)
    return DenseLinear(weight, bias)


class DenseLinear:
    """torch's own kernel: every GPU, half precision on the CPU, and processors without the libraries below."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

    @classmethod
    def stacked(cls, above: DenseLinear, below: Tensor) -> DenseLinear:
        """One product for two: the outputs of `above`, then those of the matrix `below` ([rows, in], no bias)."""
        bias = None if above._bias is None else pad(above._bias, (0, below.shape[0]))
        return type(above)(torch.cat([above._weight, below]), bias)

    def first(self, rows: int) -> DenseLinear:
        """The first `rows` outputs alone; shares the weights."""
        return type(self)(self._weight[:rows], None if self._bias is None else self._bias[:rows])


class HalfLinear:
    """float32 arithmetic on weights kept in float16, for weights that lose nothing by it (`fits_float16`).

    FBGEMM adds up a row along `in` in one order, except where the number of rows leaves a remainder of one or two to
    a kernel of their own. Such batches get a few rows of zeros more, so that a row's result stays its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self._stable = _stable_rows()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        remainder = rows % _SLICE
        more = self._stable[remainder] - remainder
        if more == 0:
            y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
            return y
        y = torch.ops.quantized.linear_dynamic_fp16(pad(x, (0, 0, 0, more)), self._packed)
        return y[:rows]


class NativeLinear:
    """float32 arithmetic on weights in as few bits as hold them (`kernels/linear_native.py`)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = NativeWeight(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.multiply(x)


class NativeInt8Linear:
    """8-bit activations by row and group of 32 inputs, weights in 4 or 8 bits (`kernels/linear_int8.py`).

    Over 2100 tokens of prose and answers the embedded model agrees with float32 on the most likely token at 97.4 % of
    positions (KL 0.0024), with the vocabulary head in integers too at 96.8 % (0.0030); Int8Linear at 88.5 % (0.034).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = Int8Weight(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.multiply(x)


class OneDnnLinear:
    """oneDNN's blocked layout, for bfloat16, and for float32 weights that need float32.

    A row alone has kernels of its own on CPUs with AVX512: they add up in another order, and took longer than four rows
    do (bfloat16: 141 and 105 us of SmolLM2's down projection). So a few rows of zeros are added, and a row's result
    never depends on the others.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # The layout is chosen for a batch of 16 rows, which was also the best one for 1 and for 64.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if 0 < rows < _LEAST:
            x = pad(x, (0, 0, 0, _LEAST - rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y[:rows]


class Int8Linear:
    """int8 weights per output channel, activations quantised at 8 bits after each row is scaled to [-1, 1].

    One outlier row therefore costs the others nothing, and the sums are of integers: a row's result is its own, bit
    for bit. Before VNNI the instruction adds pairs of products in 16 bits, which overflow unless one side keeps to
    7 bits; weights bear that better than activations. Over 1000 tokens of prose SmolLM2 then agrees with float32 on
    the most likely token at 88 % of positions (KL 0.046); with 7-bit activations at 80 % (0.12).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.float()
        levels = 127 if has_vnni() else 63
        scales = weight.abs().amax(1).clamp_min(1e-8).double() / levels  # [out]
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch 2.13 announces the end of quantised tensor types
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        size = values.abs().amax(-1, keepdim=True).clamp_min_(1e-8)  # [rows, 1]
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            values / size, 1 / 127, 128, self._packed
        )
        y = y.mul_(size) if self._bias is None else torch.addcmul(self._bias, y, size)
        return y.to(x.dtype)


def has_integers(mode: Literal["none", "int8"], backend: Backend) -> bool:
    """Whether products are those of `kernels/linear_int8.py`."""
    return mode == "int8" and backend == "native" and multiplies_integers()


def fits_float16(weight: Tensor) -> bool:
    """Whether no value of float32 `weight` has more significant bits than float16, or is beyond its range. [out, in]

    True of what came from float16, and in practice from bfloat16: of that, float16 rounds only values below 2**-17,
    and these by 2**-25 at most.
    """
    # In slices: a copy of a whole vocabulary's weight would be the largest allocation of a start.
    for part in weight.split(4096):
        if bool((part.view(torch.int32) & 0x1FFF).any()) or not bool(part.abs().max() <= 65504):
            return False
    return True


def _has_fbgemm() -> bool:
    return torch.backends.quantized.engine in ("x86", "fbgemm")  # torch offers these where the CPU has AVX2


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def has_vnni() -> bool:
    """Whether this CPU sums products of four 8-bit integers in one instruction of 512 bits."""
    return bool(torch.cpu._is_vnni_supported())


@lru_cache(maxsize=1)
def _stable_rows() -> tuple[int, ...]:
    """For r rows in [0, 120], the least number of rows >= r whose results have the bits of a full slice.

    Found by trying, as the kernels' partition of rows differs between instruction sets and releases (20 ms, once).
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 600, generator=generator).half().float()
    row = torch.randn(1, 600, generator=generator)
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def run(rows: int) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(row.expand(rows, -1).contiguous(), packed)
        return y

    reference = run(_SLICE)[:1]
    stable = [_SLICE] * (_SLICE + 1)
    for rows in range(_SLICE, 0, -1):
        same = bool((run(rows) == reference).all())
        stable[rows] = rows if same or rows == _SLICE else stable[rows + 1]
    stable[0] = 0
    return tuple(stable)
