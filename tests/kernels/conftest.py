"""Kernel tests run on the CPU: Triton kernels in interpreter mode, which must be chosen before triton is imported."""

import pytest
import torch

from linocut.kernels.interpreter import use_interpreter

use_interpreter()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
