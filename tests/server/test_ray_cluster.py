"""What a server asks of Ray, and what it refuses. tests/e2e/test_ray.py has a cluster."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import ray
from fake_engine import FakeEngine

from linocut.engine.config import EngineConfig
from linocut.engine.errors import ConfigError
from linocut.server import ray_cluster
from linocut.server.logs import LogSettings
from linocut.server.ray_cluster import RayCluster
from linocut.server.settings import ServerSettings

NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}},
    {"Alive": True, "Resources": {"CPU": 64.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


class Asked:
    """In the place of Ray: two living nodes; notes what is asked of it."""

    def __init__(self, patch: pytest.MonkeyPatch, gpus: float = 2.0) -> None:
        self.groups: list[tuple[list[dict[str, float]], str]] = []
        self.started: list[tuple[Any, ...]] = []
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": 68.0, "GPU": gpus})
        patch.setattr(ray, "nodes", lambda: NODES)
        patch.setattr(ray.util, "placement_group", self._reserve)
        patch.setattr(ray_cluster, "ActorProcess", self._start)
        self.cluster = RayCluster(None, LogSettings())
        self.cluster._interface = "10.0.0.5"

    def _reserve(self, bundles: list[dict[str, float]], strategy: str, name: str) -> str:
        self.groups.append((bundles, strategy))
        return name

    def _start(self, *given: Any) -> FakeEngine:
        self.started.append(given)
        return FakeEngine()

    def launches(self, replicas: int = 1, model: str | None = None, **fields: Any) -> list[EngineConfig]:
        """The configurations of the engines that are started."""
        launches = self.cluster.launches(EngineConfig(model="here", **fields), model, replicas)
        for launch in launches:
            assert launch.interface == "10.0.0.5"
            launch.start("tcp://in", "tcp://out")
        return [given[4] for given in self.started]


def test_each_engine_has_a_placement_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    configs = asked.launches(replicas=3, tensor_parallel_size=2)
    assert asked.groups == [([{"GPU": 1, "CPU": 1}] * 2, "STRICT_PACK")] * 3
    assert [given[:3] for given in asked.started] == [(f"engine {n}", f"engine {n}", 0) for n in range(3)]
    assert {(config.device, config.replicas) for config in configs} == {("cuda", 1)}


@pytest.mark.parametrize(
    ("fields", "bundle", "strategy"),
    [
        ({"tensor_parallel_size": 4}, {"GPU": 1, "CPU": 1}, "PACK"),
        ({"tensor_parallel_size": 4, "device": "cpu"}, {"CPU": 1}, "STRICT_PACK"),
        ({"tensor_parallel_size": 4, "device": "cpu", "threads": 16}, {"CPU": 16}, "STRICT_PACK"),
        ({"tensor_parallel_size": 4, "device": "cpu", "threads": 17}, {"CPU": 17}, "PACK"),
    ],
)
def test_an_engine_is_on_one_node_where_a_living_one_is_large_enough(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], bundle: dict[str, float], strategy: str
) -> None:
    asked = Asked(monkeypatch)
    (config,) = asked.launches(**fields)
    assert asked.groups == [([bundle] * 4, strategy)]
    assert config.threads == bundle.get("CPU") or config.device == "cuda"


def test_a_cluster_without_gpus_computes_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, gpus=0.0)
    (config,) = asked.launches()
    assert (config.device, config.threads, asked.groups) == ("cpu", 1, [([{"CPU": 1}], "STRICT_PACK")])


def test_a_model_goes_by_a_name_that_holds_on_every_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, name in ((None, "smollm2-135m-linocut"), ("org/name", "org/name"), ("model", str(tmp_path / "model"))):
        assert Asked(monkeypatch).launches(model=given)[0].model == name


def test_cards_are_rays_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--device cuda:1: Ray chooses the cards"):
        Asked(monkeypatch).launches(device="cuda:1")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'linocut\[distributed\]'"), RayCluster(None, LogSettings()):
        pass


def test_a_cluster_that_does_not_answer_is_named() -> None:
    with (
        pytest.raises(ConfigError, match=r"cannot join the Ray cluster 127\.0\.0\.1:1: .*refused"),
        RayCluster("127.0.0.1:1", LogSettings()),
    ):
        pass


@pytest.mark.parametrize("variable", [True, False])
def test_the_server_has_to_be_on_a_node(monkeypatch: pytest.MonkeyPatch, variable: bool) -> None:
    address = "ray://10.0.0.5:10001"
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="the server has to be on a node of the cluster"):
        RayCluster(None if variable else address, LogSettings())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distributed": "slurm"}, "--distributed 'slurm'"),
        ({"ray_address": "a:1"}, "--ray-address needs --distributed"),
    ],
)
def test_options_that_mean_nothing_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerSettings(served_names=("m",), **fields)  # type: ignore[arg-type]
