"""Kernels that start before the one in front has ended.

A GPU needs a microsecond or more between two kernels of a stream to drain the one and start the other. With
programmatic dependent launch (Hopper and later) a kernel's programs are placed as soon as those of the kernel in front
allow it, and wait for its results. Every kernel launched so calls `follow` in every program before it reads or writes
what other kernels touch: only then do a wait for the last kernel and its end imply the end of all before it. What is
read before that has to be older than the last kernel that was launched in the ordinary way, as torch's are: such a
launch waits for all before it and makes what they wrote visible; to be the next one behind the writer is not enough.
(CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.)
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Beyond this many rows kernels run for longer than it takes to start them (measured: a few percent slower).
MOST_ROWS = 1024


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Let the next kernel place its programs, and wait for the results of the one in front."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


def overlap(device: torch.device, rows: int) -> dict[str, bool]:
    """The settings of a launch whose kernel calls `follow`."""
    # Other backends than NVIDIA's do not know the option.
    return {"OVERLAP": True, "launch_pdl": True} if rows <= MOST_ROWS and is_hopper(device) else {"OVERLAP": False}


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """A GPU of NVIDIA's with the instructions used here; false in the interpreter."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and not triton.knobs.runtime.interpret
    )
