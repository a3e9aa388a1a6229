"""Engines as actors of a Ray cluster: Ray finds a place for each of their ranks, and tells when one is lost."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from linocut.engine.config import EngineConfig
from linocut.engine.errors import ConfigError
from linocut.engine.models.embedded import ADAPTED
from linocut.engine.parallel.actor import ActorProcess

from .engine_entry import run_placed
from .engine_launch import Launch
from .logs import LogSettings
from .threads import settle_threads

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger(__name__)

REACH_SECONDS = 10.0

# Settings of Ray, where the operator has none: it tells nobody that it is used, and prints lines as they are.
_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0"}
# How OpenMP waits has to be known before torch is imported, which is when an actor gets its function.
_THREADS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class RayCluster:
    """A context manager, in which this process is a driver of the cluster. All that it starts there ends with it.

    address: HOST:PORT of the cluster's head; or "auto", the cluster that this machine is a node of ($RAY_ADDRESS, or
    the last `ray start`). None: the same, or where there is none, a Ray of this machine alone, while the context lasts.
    Raises ConfigError.
    """

    def __init__(self, address: str | None, logs: LogSettings) -> None:
        self._address, self._logs = address, logs
        given = address or os.environ.get("RAY_ADDRESS", "")
        if given.startswith("ray://"):
            raise ConfigError(f"{given}: the server has to be on a node of the cluster; write HOST:PORT")

    def __enter__(self) -> RayCluster:
        for name, value in _RAY.items():
            os.environ.setdefault(name, value)
        try:
            from ray import init
        except ImportError:
            raise ConfigError("--distributed ray needs the package ray: pip install 'linocut[distributed]'") from None
        from ray.exceptions import RayError
        from ray.util import get_node_ip_address

        settle_threads()
        try:
            self._reach()
            init(
                self._address,
                # Lines of engines elsewhere are printed here, with what Ray puts before them: no JSON.
                log_to_driver=self._logs.format == "text",
                logging_level=logging.WARNING,
                include_dashboard=False,
                runtime_env={"env_vars": {name: os.environ[name] for name in _THREADS if name in os.environ}},
            )
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise ConfigError(f"cannot join the Ray cluster {self._address or ''}: {error}") from error
        self._interface = get_node_ip_address()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    def _reach(self) -> None:
        """Raise OSError where nobody listens: Ray would try for a quarter of an hour."""
        host, colon, port = (self._address or "").rpartition(":")
        if colon and port.isdecimal():
            socket.create_connection((host, int(port)), REACH_SECONDS).close()

    def launches(self, config: EngineConfig, model: str | None, replicas: int) -> list[Launch]:
        """Of engines that Ray places. model: what the operator wrote, which each node looks up. Raises ConfigError."""
        config, bundle = _share(config)
        config = msgspec.structs.replace(config, model=_portable(model))
        ranks = config.tensor_parallel_size
        log.info("Ray is asked for %d x %d x %s", replicas, ranks, bundle)
        places = {name: _reserve(name, bundle, ranks) for name in (f"engine {number}" for number in range(replicas))}
        return [Launch(self._start(name, config, place), self._interface) for name, place in places.items()]

    def _start(self, name: str, config: EngineConfig, group: PlacementGroup) -> Callable[[str, str], ActorProcess]:
        def start(input_endpoint: str, output_endpoint: str) -> ActorProcess:
            return ActorProcess(name, group, 0, run_placed, config, self._logs, input_endpoint, output_endpoint)

        return start


def _share(config: EngineConfig) -> tuple[EngineConfig, dict[str, float]]:
    """The configuration of a rank on any node, and what of a node it takes. Raises ConfigError."""
    import ray

    device = config.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    if device == "cuda":
        return msgspec.structs.replace(config, device=device), {"GPU": 1, "CPU": 1}
    if device != "cpu":
        raise ConfigError(f"--device {device}: Ray chooses the cards; write cuda or cpu")
    threads = config.threads or 1
    return msgspec.structs.replace(config, device=device, threads=threads), {"CPU": threads}


def _portable(model: str | None) -> str:
    """The same name, for processes in other folders and on other machines."""
    if model is None:
        return ADAPTED
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _reserve(name: str, bundle: dict[str, float], ranks: int) -> PlacementGroup:
    """Room for an engine: on one node, if there is a node that large. What is lost of it, Ray reserves elsewhere."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = any(all(node.get(name, 0) >= ranks * count for name, count in bundle.items()) for node in nodes)
    return ray.util.placement_group([bundle] * ranks, strategy="STRICT_PACK" if fits else "PACK", name=name)
