"""Which implementation of a device function runs: the torch reference or the Triton kernel."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

Backend = Literal["torch", "triton"]


def default_backend(device: torch.device) -> Backend:
    """Return "triton" on a CUDA (or ROCm) device where triton can be imported, otherwise "torch"."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "torch"
