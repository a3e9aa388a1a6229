"""Which implementation runs, and that nothing is imported before it is used."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import torch

from linocut.kernels.backend import default_backend


def test_triton_runs_on_cuda_where_it_is_installed(monkeypatch):
    assert default_backend(torch.device("cpu")) == "torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert default_backend(torch.device("cuda")) == "triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert default_backend(torch.device("cuda")) == "torch"


def test_the_package_imports_nothing_and_its_modules_no_triton():
    program = (
        "import sys, linocut.kernels\n"
        "assert 'torch' not in sys.modules\n"
        "from linocut.kernels import attention, backend, filters, norm, philox, rope, statistics\n"
        "assert 'linocut.kernels.attention_triton' not in sys.modules\n"
        "assert 'triton.language' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
