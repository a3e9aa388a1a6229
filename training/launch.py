"""Training in processes of their own, one for each GPU: starting them, and ending with them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from linocut.engine.errors import ModelError

from .settings import AdaptSettings


def count_gpus(settings: AdaptSettings, devices: int | None) -> int:
    """How many GPUs a run gets: up to `devices` of those there are (None: all), 0 if it is to train elsewhere."""
    if settings.device not in (None, "cuda"):
        return 0
    there = torch.cuda.device_count()
    return min(devices or there, there)


def launch(settings: AdaptSettings, count: int) -> None:
    """Run the adapt stage in `count` processes and return when they have ended. Raises ModelError if they failed.

    They answer SIGTERM and Ctrl-C with a checkpoint and an export, and get the time that takes.
    """
    folder = Path(settings.run)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "given.json"
    settings.save(file)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "linocut.training.adapt", str(file)]
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": "4", **os.environ})
    with _passing_sigterm_to(process):
        status = _wait(process)
    if status:
        raise ModelError(f"training ended with status {status}: its messages stand above")


@contextlib.contextmanager
def _passing_sigterm_to(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ctrl-C reaches the whole process group, a SIGTERM this process alone. Only a main thread may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(process: subprocess.Popen[Any]) -> int:
    """The status of a process that ends itself after a Ctrl-C; a second one ends it at once."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.kill()
            raise
