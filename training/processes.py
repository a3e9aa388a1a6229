"""The processes of one run: one per device, started by torchrun or alone."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """Rank and sums between processes. With one process every method is free."""

    def __init__(self, device: str | None = None) -> None:
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device(kind)
        self._owns = False
        if self.world > 1 and not dist.is_initialized():
            # gloo carries the host's decisions, so that they never wait for the device.
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            self._owns = True

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, values: list[float]) -> list[float]:
        """The first process's `values`, in every process. Host memory only."""
        if self.world == 1:
            return values
        carried = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(carried, src=0)
        return [float(v) for v in carried]

    def wait(self) -> None:
        """Return when every process has come here."""
        self.share([0.0])
        if self.world > 1:
            total = torch.zeros(1)
            dist.all_reduce(total)  # on the host: gloo

    def close(self) -> None:
        """Leave the group. The first process goes last: it holds the store that the others take leave of."""
        if self._owns:
            if self.leads:
                time.sleep(1.0)
            dist.destroy_process_group()
            self._owns = False


def end_process(status: int) -> None:
    """End a training process whose work is done and closed.

    Without the interpreter's teardown: now and then one of gloo's threads outlives its group there and aborts a process
    whose results are all written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
