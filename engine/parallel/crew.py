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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from .peers import peer_sums
from .process import Process
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
    """Ranks 1 and up of `size`, each a process of this host, and this process's own `ranks`, valid after `start`.

    They end together: when one dies, those that are left exit with status 70 within three seconds, whatever they wait
    for. `RayCrew` has them elsewhere.
    """

    ranks: Ranks

    def __init__(self, size: int) -> None:
        self.size = size
        # Private, so that nobody else can join.
        self._folder = tempfile.TemporaryDirectory(prefix="linocut-")
        self._members: list[Process] = []
        self._dismiss: Callable[[], None] | None = None
        self._closing = threading.Event()
        self._lost = False

    def start(self, device: torch.device, work: Work, *args: Any, dismiss: Callable[[], None] | None = None) -> None:
        """Have each of the others run `work(ranks, *args)`, and meet them.

        device: rank 0's. dismiss: tells the others to end; None: their work ends by itself.
        """
        self._dismiss = dismiss
        self._members = [self.begin(rank, device, work, args) for rank in range(1, self.size)]
        threading.Thread(target=self._watch, name="linocut-crew", daemon=True).start()
        atexit.register(self.close)
        self.ranks = self.join(device)

    # ------------------------------------------------------------------ where they are

    @property
    def devices(self) -> int:
        """How many GPUs this process has to see."""
        return self.size

    def endpoint(self, name: str) -> str:
        """Where this process may bind a ZeroMQ socket that the others connect to."""
        return f"ipc://{Path(self._folder.name) / name}"

    def begin(self, rank: int, device: torch.device, work: Work, args: tuple[Any, ...]) -> Process:
        """The process of a further rank, started. On GPUs it takes the one that is `rank` behind rank 0's."""
        mine = torch.device("cuda", device.index + rank) if device.type == "cuda" else device
        given = (rank, self.size, self._meeting, str(mine), work, args)
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=given, name=f"linocut-rank-{rank}", daemon=True
        )
        process.start()
        return process

    def join(self, device: torch.device) -> Ranks:
        """Become rank 0."""
        return join(0, self.size, self._meeting, device)

    @property
    def _meeting(self) -> Path:
        return Path(self._folder.name) / "meeting"

    # ------------------------------------------------------------------ their end

    def close(self) -> None:
        """End the others, and leave the group. A second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        atexit.unregister(self.close)
        if not self._lost and self._dismiss is not None:
            self._dismiss()
        deadline = time.monotonic() + (0.0 if self._lost else FAREWELL)
        if not self._lost and dist.is_initialized():
            # Ranks end a group together, and one of them may not get to it.
            leaving = threading.Thread(target=dist.destroy_process_group, name="linocut-crew", daemon=True)
            leaving.start()
            leaving.join(FAREWELL)
            if leaving.is_alive():
                log.warning("the ranks did not end their group within %g s", FAREWELL)
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
    """Become `rank` of the group of this host that meets in the file `meeting`. Returns when all are there."""
    if device.type == "cpu":
        # All share the host's cores.
        torch.set_num_threads(max(torch.get_num_threads() // size, 1))
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    ranks = enter(rank, size, FileStore(str(meeting), size), device, loopback)
    ranks.peers = peer_sums(ranks)
    return ranks


def enter(rank: int, size: int, store: Store, device: torch.device, interface: str | None) -> Ranks:
    """Become `rank` of the group that meets in `store`, over a network interface. Returns when all are there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if interface is not None:
        # Else gloo looks the host's name up, which need not lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(rank, size, device)


def _serve(rank: int, size: int, meeting: Path, device: str, work: Work, args: tuple[Any, ...]) -> None:
    """A process of a crew."""
    threading.Thread(target=_end_with_parent, name="linocut-crew", daemon=True).start()
    # Whoever interrupts a whole group of processes leaves it to rank 0 to end this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    do(lambda: join(rank, size, meeting, torch.device(device)), work, args)


def do(join: Callable[[], Ranks], work: Work, args: tuple[Any, ...]) -> None:
    """A further rank's life: join, work, leave. A failure ends the process."""
    # What rank 0 says of the model is said once.
    logging.getLogger("linocut").setLevel(logging.ERROR)
    try:
        work(join(), *args)
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
