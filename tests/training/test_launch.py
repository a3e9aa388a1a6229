"""Training in processes of their own: how they are started, and that they may end themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import make_settings

from linocut.engine.errors import ModelError
from linocut.training import launch as launching
from linocut.training.launch import count_gpus, launch
from linocut.training.settings import load_settings

# Like a training process: it answers either signal in its own time.
_WORKER = """
import signal, sys, time
from pathlib import Path

def end(number, frame):
    time.sleep(0.6)
    Path(sys.argv[1], "checkpoint").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def test_each_gpu_gets_a_process_and_a_single_one_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def start(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(launching.subprocess, "Popen", start)
    settings = make_settings(tmp_path)
    for count in (2, 1):
        launch(settings, count)
    assert "--nproc-per-node=2" in commands[0]
    assert "torch.distributed.run" not in commands[1]
    for command in commands:
        assert command[-3:-1] == ["-m", "linocut.training.adapt"]
        assert load_settings(Path(command[-1])) == settings


def test_gpus_are_used_as_far_as_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anywhere = make_settings(tmp_path, device=None)
    for there, asked, expected in ((0, None, 0), (0, 2, 0), (4, None, 4), (4, 2, 2), (4, 8, 4)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert count_gpus(anywhere, asked) == expected
    assert count_gpus(make_settings(tmp_path, device="cpu"), None) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_has_the_time_for_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    real, started = subprocess.Popen, []

    def start(command: list[str], **options: Any) -> Any:
        started.append(real([sys.executable, "-c", _WORKER, str(tmp_path)]))
        return started[0]

    def tell() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        if number == signal.SIGINT:  # which a terminal sends to the whole group
            started[0].send_signal(number)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(launching.subprocess, "Popen", start)
    before = signal.getsignal(signal.SIGTERM)
    teller = threading.Thread(target=tell)
    teller.start()
    launch(make_settings(tmp_path), 1)
    teller.join()
    assert (tmp_path / "checkpoint").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[bool] = []

    class Process:
        def __init__(self, command: list[str], **options: Any) -> None: ...

        def wait(self) -> int:
            raise KeyboardInterrupt

        def kill(self) -> None:
            killed.append(True)

    monkeypatch.setattr(launching.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        launch(make_settings(tmp_path), 1)
    assert killed == [True]


def test_a_run_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: 3))
    with pytest.raises(ModelError, match="status 3"):
        launch(make_settings(tmp_path), 2)
