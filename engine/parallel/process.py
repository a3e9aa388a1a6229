"""What is asked of a process that this one has started, wherever it runs."""

from __future__ import annotations

from typing import Protocol


class Process(Protocol):
    """A process of multiprocessing, or what stands for one (`ActorProcess`).

    sentinel: a file descriptor that is readable once it has ended. exitcode: None while it runs, and where its status
    is not known. pid: of this machine; None elsewhere. `kill` returns at once.
    """

    @property
    def sentinel(self) -> int: ...
    @property
    def exitcode(self) -> int | None: ...
    @property
    def pid(self) -> int | None: ...
    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...
    def kill(self) -> None: ...
