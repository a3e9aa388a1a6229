"""The engine's process as the server handles it: launched, asked where it hangs, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from linocut.engine.config import EngineConfig

from .logs import LogSettings
from .threads import settle_threads

STOP_SECONDS = 5.0  # from Shutdown to SIGKILL


class EngineProcess(Protocol):
    """What the client needs of `multiprocessing.process.BaseProcess`."""

    @property
    def sentinel(self) -> int: ...
    @property
    def exitcode(self) -> int | None: ...
    @property
    def pid(self) -> int | None: ...
    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...
    def kill(self) -> None: ...


Launch = Callable[[str, str], EngineProcess]  # (input endpoint, output endpoint) -> started process


def launch_engine(config: EngineConfig, logs: LogSettings) -> Launch:
    """A launcher of the real engine, in a process of its own."""

    def launch(input_endpoint: str, output_endpoint: str) -> EngineProcess:
        import multiprocessing

        from .engine_entry import run

        # Idle OpenMP threads that spin would take the cores from this process.
        settle_threads()
        process = multiprocessing.get_context("spawn").Process(
            target=run, args=(config, logs, input_endpoint, output_endpoint), name="linocut-engine", daemon=False
        )
        with _interrupts_ignored():
            process.start()
        return process

    return launch


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """The engine inherits "ignore": we alone decide when it stops.

    Ctrl-C goes to the whole foreground group, and some service managers send SIGTERM to every process of a service.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_process(process: EngineProcess, patience: float) -> None:
    """Wait `patience` seconds for the process to end by itself, then kill it."""
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join(STOP_SECONDS)


def ask_for_stacks(process: EngineProcess) -> None:
    """Have the engine print where its threads are (see `run_engine`); one that is stopped or gone does not."""
    if process.pid is not None and hasattr(signal, "SIGUSR1"):
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGUSR1)


def obituary(exit_code: int | None) -> str:
    """Why the process ended, for the log."""
    if exit_code == -getattr(signal, "SIGKILL", 9):
        return "the engine process was killed (SIGKILL); out of memory, if nobody did it"
    return f"the engine process ended with exit code {exit_code}"
