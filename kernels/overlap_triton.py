"""What kernels do for each other: start before the one in front has ended, and ask for what the next one reads.

A GPU needs a microsecond or more between two kernels of a stream to drain the one and start the other. With
programmatic dependent launch (Hopper and later) a kernel's programs are placed as soon as those of the kernel in front
allow it, and wait for its results. Every kernel launched so calls `follow` in every program before it reads or writes
what other kernels touch: only then do a wait for the last kernel and its end imply the end of all before it. (CUDA C++
Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.)

Between two products of a forward lie short kernels that leave the memory idle for longer than they run. The bulk
prefetch of Hopper is one instruction for kilobytes that nobody waits for: with it they have the first of the next
product's weights brought into the L2 cache meanwhile. It changes no result. (PTX ISA, `cp.async.bulk.prefetch.L2`.)
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Beyond this many rows kernels run for longer than it takes to start them (measured: a few percent slower).
MOST_ROWS = 1024
# Beyond this many rows a product is bound by its arithmetic.
MOST_ROWS_AHEAD = 128
_CHUNK = tl.constexpr(4096)


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Let the next kernel place its programs, and wait for the results of the one in front."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch_ahead(ptr, chunks, program, programs, THREADS: tl.constexpr):
    """Ask for this program's share of the `chunks` times 4096 bytes at `ptr`, a multiple of 16."""
    base = tl.cast(ptr, tl.int64)
    lane = program * THREADS + tl.arange(0, THREADS)
    for first in range(0, chunks, programs * THREADS):
        chunk = first + lane
        tl.inline_asm_elementwise(
            """{
            .reg .pred wanted;
            setp.ne.s32 wanted, $2, 0;
            @wanted cp.async.bulk.prefetch.L2.global [$1], 4096;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [base + chunk.to(tl.int64) * _CHUNK, (chunk < chunks).to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def overlap(device: torch.device, rows: int) -> dict[str, bool]:
    """The settings of a launch whose kernel calls `follow`."""
    # Other backends than NVIDIA's do not know the option.
    return {"OVERLAP": True, "launch_pdl": True} if rows <= MOST_ROWS and is_hopper(device) else {"OVERLAP": False}


def ahead_of(ahead: Tensor | None, rows: int, most: int, unused: Tensor) -> tuple[dict[str, Any], bool]:
    """What a launch is told of the weights to ask for, at most `most` bytes of them, and whether it is any."""
    if ahead is None or rows > MOST_ROWS_AHEAD or not is_hopper(ahead.device):
        return {"ahead_ptr": unused, "ahead_chunks": 0}, False
    return {"ahead_ptr": ahead, "ahead_chunks": min(ahead.numel() * ahead.element_size(), most) // _CHUNK.value}, True


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """A GPU of NVIDIA's with the instructions used here; false in the interpreter."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and not triton.knobs.runtime.interpret
    )
