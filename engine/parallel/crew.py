"""The processes of a tensor-parallel engine: this one, which is rank 0, and those that it starts."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .ranks import Ranks

log = logging.getLogger("linocut.engine")

# The exit status of a process whose fellow has died.
LOST = 70
# Seconds for the main thread to end by itself then: a collective without a peer may raise, or wait for ever.
PATIENCE = 2.0
# Seconds for the others to end when they are no longer wanted.
FAREWELL = 5.0

Work = Callable[..., None]


class Crew:
    """Ranks 1 and up of `size`, each a process that runs `work(ranks, *args)`, and this process's own `ranks`.

    device: rank 0's; on a GPU, the others take those behind it. Processes of one host end together: when one dies,
    those that are left exit with status 70 within three seconds, whatever they wait for.
    """

    def __init__(self, size: int, device: torch.device, work: Work, *args: Any) -> None:
        # Private, so that nobody else can join.
        self._folder = tempfile.TemporaryDirectory(prefix="linocut-")
        meeting = Path(self._folder.name) / "meeting"
        self._members = self.start(size, meeting, device, work, args)
        self._closing = threading.Event()
        self._lost = False
        threading.Thread(target=self._watch, name="linocut-crew", daemon=True).start()
        atexit.register(self.close)
        self.ranks = join(0, size, meeting, device)

    def start(
        self, size: int, meeting: Path, device: torch.device, work: Work, args: tuple[Any, ...]
    ) -> list[BaseProcess]:
        """The processes of ranks 1 and up, started."""
        context = multiprocessing.get_context("spawn")
        members: list[BaseProcess] = []
        for rank in range(1, size):
            given = (rank, size, meeting, str(device), work, args)
            members.append(context.Process(target=_serve, args=given, name=f"linocut-rank-{rank}", daemon=True))
            members[-1].start()
        return members

    def dismiss(self) -> None:
        """Tell the others to end; here, their work ends by itself."""

    def close(self) -> None:
        """End the others, and leave the group. A second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        atexit.unregister(self.close)
        if not self._lost:
            self.dismiss()
            if dist.is_initialized():
                dist.destroy_process_group()
        deadline = time.monotonic() + (0.0 if self._lost else FAREWELL)
        for member in self._members:
            member.join(max(deadline - time.monotonic(), 0.0))
            if member.is_alive():
                member.kill()
                member.join()
        self._folder.cleanup()

    def _watch(self) -> None:
        sentinels = {member.sentinel: rank for rank, member in enumerate(self._members, start=1)}
        while not self._closing.is_set():
            for gone in wait(list(sentinels), timeout=0.5):
                if self._closing.is_set():
                    return
                rank = sentinels[gone]  # type: ignore[index]
                status = self._members[rank - 1].exitcode
                if status == 0:  # its work is done
                    del sentinels[gone]  # type: ignore[arg-type]
                    continue
                self._lost = True
                log.error("rank %d of the engine has ended with exit code %s", rank, status)
                if not self._closing.wait(PATIENCE):
                    os._exit(LOST)
                return
            if not sentinels:
                return


def join(rank: int, size: int, meeting: Path, device: torch.device) -> Ranks:
    """Become `rank` of the group that meets in the file `meeting`. Returns when all are there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # All share the host's cores.
        torch.set_num_threads(max(torch.get_num_threads() // size, 1))
    names = [name for _, name in socket.if_nameindex()]
    for loopback in ("lo", "lo0"):
        if loopback in names:
            # Else gloo looks the host's name up, which need not lead anywhere.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(meeting), size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(rank, size)


def _serve(rank: int, size: int, meeting: Path, device: str, work: Work, args: tuple[Any, ...]) -> None:
    """A process of a crew."""
    threading.Thread(target=_end_with_parent, name="linocut-crew", daemon=True).start()
    # Whoever interrupts a whole group of processes leaves it to rank 0 to end this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What rank 0 says of the model is said once.
    logging.getLogger("linocut").setLevel(logging.ERROR)
    try:
        first = torch.device(device)
        mine = torch.device("cuda", first.index + rank) if first.type == "cuda" else first
        work(join(rank, size, meeting, mine), *args)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(LOST)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(LOST)
