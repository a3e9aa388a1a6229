"""What several engines of one machine take each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from linocut.engine import machine
from linocut.engine.config import EngineConfig
from linocut.engine.errors import ConfigError
from linocut.engine.machine import choose_dtype, share_machine


def share(replica: int, replicas: int, **fields: object) -> EngineConfig:
    return share_machine(EngineConfig(model="m", replica=replica, replicas=replicas, **fields))


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_a_single_engine_is_configured_as_it_was() -> None:
    config = EngineConfig(model="m", device="cuda:3")
    assert share_machine(config) == config


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_each_engine_has_a_card(device: str) -> None:
    assert [share(number, 4, device=device).device for number in range(4)] == [f"cuda:{n}" for n in range(4)]


@pytest.mark.usefixtures("cards")
def test_cards_are_those_from_the_configured_one_on() -> None:
    assert [share(number, 2, device="cuda:2").device for number in range(2)] == ["cuda:2", "cuda:3"]


@pytest.mark.usefixtures("cards")
def test_an_engine_of_several_ranks_has_as_many_cards() -> None:
    assert [share(number, 2, tensor_parallel_size=2).device for number in range(2)] == ["cuda:0", "cuda:2"]
    with pytest.raises(ConfigError, match="2 replicas of 3 GPUs from cuda:0 on need 6 GPUs, not 4"):
        share(0, 2, tensor_parallel_size=3)


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize(("device", "replicas"), [("auto", 5), ("cuda:3", 2)])
def test_too_few_cards_are_refused(device: str, replicas: int) -> None:
    with pytest.raises(ConfigError, match=f"{replicas} replicas of 1 GPUs from cuda:. on need 5 GPUs, not 4"):
        share(0, replicas, device=device)


def test_processors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [share(number, 3, device="cpu").threads for number in range(3)] == [2, 2, 2]
    assert share(0, 16, device="cpu").threads == 1
    assert share(0, 2, device="cpu", threads=7).threads == 7


def test_an_engine_has_a_number_below_theirs() -> None:
    with pytest.raises(ConfigError, match="replica must be"):
        share(2, 2)


@pytest.mark.parametrize("kernels", [True, False])
def test_int8_computes_in_float32_where_its_kernels_are(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "multiplies_integers", lambda: kernels)
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    stored, cpu = SimpleNamespace(dtype="bfloat16"), torch.device("cpu")
    int8 = EngineConfig(model="m", quantization="int8")
    assert choose_dtype(int8, stored, cpu) == (torch.float32 if kernels else torch.bfloat16)
    assert choose_dtype(EngineConfig(model="m"), stored, cpu) == torch.bfloat16
