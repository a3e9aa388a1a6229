"""The processes of a tensor-parallel engine whose ranks Ray has placed: actors, on one node or on several."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Any

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .actor import ActorProcess
from .crew import Crew, Work, do, enter
from .process import Process
from .ranks import Ranks

# ioctl of Linux: the address of a network interface.
SIOCGIFADDR = 0x8915


class RayCrew(Crew):
    """To be made in an actor that is in bundle 0 of a placement group of `size` bundles: rank r is put in bundle r.

    Each rank sees what its bundle holds, so on GPUs one card. When rank 0's actor ends, Ray ends those that it started.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._group = ray.util.get_current_placement_group()
        self._address = ray.util.get_node_ip_address()
        # A store of torch's listens on all addresses, unless it is given a socket.
        listener = socket.create_server((self._address, 0))
        self._place: tuple[str, int] = listener.getsockname()
        host, port = self._place
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())

    @property
    def devices(self) -> int:
        return 1

    def endpoint(self, name: str) -> str:
        return f"tcp://{self._address}:*"

    def begin(self, rank: int, device: torch.device, work: Work, args: tuple[Any, ...]) -> Process:
        given = (rank, self.size, self._place, str(device), work, args)
        return ActorProcess(f"rank {rank}", self._group, rank, _serve, *given)

    def join(self, device: torch.device) -> Ranks:
        return enter(0, self.size, self._store, device, interface_of(self._address))


def _serve(rank: int, size: int, meeting: tuple[str, int], device: str, work: Work, args: tuple[Any, ...]) -> None:
    """An actor of a crew."""

    def join() -> Ranks:
        interface = interface_of(ray.util.get_node_ip_address())
        return enter(rank, size, TCPStore(*meeting), torch.device(device), interface)

    do(join, work, args)


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None if that cannot be found out."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    return None
