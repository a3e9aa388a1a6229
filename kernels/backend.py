"""Which implementation of a device function runs: the torch reference, the Triton kernel, or the CPU's in C."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

# "native" stands for "torch" wherever a function, or what it is given, has no kernel in C.
Backend = Literal["torch", "triton", "native"]


def default_backend(device: torch.device) -> Backend:
    """Return "triton" on a CUDA (or ROCm) device where triton can be imported, otherwise "torch"."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "torch"
