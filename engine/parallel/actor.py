"""Processes somewhere in a Ray cluster, handled as if they were this machine's. Ray is imported when one is started."""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger("linocut.engine")

_COLOUR = re.compile(r"\x1b\[\d*m")


class ActorProcess:
    """`target(*args)`, run by a Ray actor of its own, in a bundle of a placement group (see `Process`).

    The actor has all that the bundle holds. It starts when Ray has room for it, however long that takes, and ends with
    its function, or when the process that started it ends. Ray tells when it has died, with its node for instance. It
    is not started again: what it was doing is known by others only.
    """

    pid = None

    def __init__(
        self, name: str, group: PlacementGroup, bundle: int, target: Callable[..., object], *args: object
    ) -> None:
        """name: of the actor in logs. target, args: pickled."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.name = name
        self.exitcode: int | None = None
        self.sentinel, end = os.pipe()
        weakref.finalize(self, os.close, self.sentinel)
        self._ended, self._unwanted = threading.Event(), False
        resources = group.bundle_specs[bundle]
        # Until the function is called, Ray may try again elsewhere; `run` itself is called once.
        actor_class = ray.remote(_Linocut).options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
        )
        self._actor: Any = actor_class.remote(name)
        running: Future[None] = self._actor.run.options(max_task_retries=0).remote(target, args).future()
        running.add_done_callback(functools.partial(self._on_end, end))

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end; then its place is free for another one."""
        if self._ended.wait(timeout):
            self.kill()

    def kill(self) -> None:
        """End it, whether it runs, still waits for its place, or cannot be reached, which Ray takes for its end."""
        import ray

        self._unwanted = True
        ray.kill(self._actor)

    def _on_end(self, end: int, running: Future[None]) -> None:
        """Called by a thread of Ray's, which must not be made to wait."""
        error = running.exception()
        if error is None:
            self.exitcode = 0
        elif not self._unwanted:
            log.error("%s has ended: %s", self.name, " ".join(_COLOUR.sub("", str(error)).split())[:1000])
        self._ended.set()
        os.close(end)


class _Linocut:
    """The actor. Ray shows its class in lists, and its name before what it logs."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def run(self, target: Callable[..., object], args: tuple[object, ...]) -> None:
        target(*args)
