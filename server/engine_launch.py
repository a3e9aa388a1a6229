"""The engine's process as the server handles it: launched, asked where it hangs, ended. Here on this host."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from linocut.engine.config import EngineConfig
from linocut.engine.parallel.process import Process

from .logs import LogSettings
from .threads import settle_threads

STOP_SECONDS = 5.0  # from Shutdown to SIGKILL


@dataclass(frozen=True)
class Launch:
    """How one engine is started, as often as need be.

    start: (input endpoint, output endpoint) -> the started process, which connects to both.
    interface: this host's IPv4 address that an engine elsewhere reaches; None: the engine is a process of this host.
    """

    start: Callable[[str, str], Process]
    interface: str | None = None


def local_launches(config: EngineConfig, replicas: int, logs: LogSettings) -> list[Launch]:
    """Of engines in processes of this host."""
    shares = (msgspec.structs.replace(config, replica=number, replicas=replicas) for number in range(replicas))
    return [Launch(_start_engine(share, logs)) for share in shares]


def _start_engine(config: EngineConfig, logs: LogSettings) -> Callable[[str, str], Process]:
    def start(input_endpoint: str, output_endpoint: str) -> Process:
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

    return start


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


def stop_process(process: Process, patience: float) -> None:
    """Wait `patience` seconds for the process to end by itself, then kill it."""
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join(STOP_SECONDS)


def ask_for_stacks(process: Process) -> None:
    """Have the engine print where its threads are (see `run_engine`); one that is stopped or elsewhere does not."""
    if process.pid is not None and hasattr(signal, "SIGUSR1"):
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGUSR1)


def obituary(exit_code: int | None) -> str:
    """Why the process ended, for the log."""
    if exit_code == -getattr(signal, "SIGKILL", 9):
        return "the engine process was killed (SIGKILL); out of memory, if nobody did it"
    if exit_code is None:
        return "the engine is gone"
    return f"the engine process ended with exit code {exit_code}"
