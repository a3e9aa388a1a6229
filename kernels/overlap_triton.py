"""Kernels that start before the one in front of them has ended.

A GPU needs a few microseconds between two kernels of a stream to drain the one and start the other, and meanwhile its
memory idles. With programmatic dependent launch (Hopper and later) a kernel's programs are placed as soon as those of
the kernel in front allow it; each does what it can, such as asking for weights, and then waits for the results. Every
kernel launched so calls `follow` or `gdc_wait` in every program before it reads or writes what other kernels touch:
only then do a wait for the last kernel and its end imply the end of all before it. (CUDA C++ Programming Guide,
"Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.)
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FETCH_BYTES = tl.constexpr(2048)


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Let the next kernel place its programs, and wait for the results of the one in front."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch(address):
    """Ask for 2048 bytes at each of `address` (int64, multiples of 16) in the L2 cache; nobody waits for them."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 2048; mov.u32 $0, 0;",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def overlap(device: torch.device) -> dict[str, bool]:
    """The settings of a launch whose kernel calls `follow` (or waits itself)."""
    # Other backends than NVIDIA's do not know the option.
    return {"OVERLAP": True, "launch_pdl": True} if allowed and can_overlap(device) else {"OVERLAP": False}


allowed = True


@lru_cache(maxsize=16)
def can_overlap(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and not triton.knobs.runtime.interpret
    )
