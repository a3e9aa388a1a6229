"""Which attention serves, and that a forward's staircase is what it promises to be."""

from __future__ import annotations

import logging
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from request_mix import mixed_requests
from test_parallel_parts import backbone
from tiny_engines import engine, prompt_of, request, run

from linocut.engine import attention_choice
from linocut.engine.attention_choice import choose_attention
from linocut.engine.config import EngineConfig
from linocut.engine.errors import ConfigError
from linocut.kernels.attention import AttentionLayout
from linocut.kernels.attention_flash import FlashUnavailableError

CPU = torch.device("cpu")


def choose(attention: Any, head_dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    return choose_attention(EngineConfig(model="", attention=attention), backbone(head_dim=head_dim), dtype, CPU)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a GPU where FlashAttention is installed; `errors` says what the self-test finds of either."""
    errors = {"triton": 0.0, "flash": 0.0}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(attention_choice, "default_backend", lambda device: "triton")
    argument = SimpleNamespace(name="q")
    operator = SimpleNamespace(_schema=SimpleNamespace(name="build::fwd", arguments=[argument]))
    monkeypatch.setattr(attention_choice, "find_flash", lambda device: operator)
    monkeypatch.setattr(
        attention_choice, "attention_error", lambda *shape: errors["triton" if shape[-1] is None else "flash"]
    )
    return errors


def test_on_a_cpu_torch_serves_and_passes_its_self_test():
    assert choose("auto") == ("torch", None)
    assert choose("torch", head_dim=24) == ("torch", None)


@pytest.mark.parametrize("attention", ["triton", "flash"])
def test_what_needs_a_gpu_is_refused_without_one(attention, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=f"attention {attention} needs a GPU"):
        choose(attention)


def test_flash_attention_serves_beside_triton_where_it_is_installed(on_a_gpu):
    backend, flash = choose("auto")
    assert (backend, flash.name, flash.everything) == ("triton", "build", False)
    assert choose("flash")[1].everything
    assert choose("triton") == ("triton", None)
    assert choose("torch") == ("torch", None)


@pytest.mark.parametrize("error", [1.0, float("nan"), float("inf")])
def test_flash_attention_that_fails_its_self_test_is_left_out_or_refused(on_a_gpu, error, caplog):
    on_a_gpu["flash"] = error
    with caplog.at_level(logging.WARNING):
        assert choose("auto") == ("triton", None)
    assert "FlashAttention is left out" in caplog.text
    with pytest.raises(ConfigError, match="fails its self-test"):
        choose("flash")


def test_a_backend_that_fails_its_self_test_stops_the_start(on_a_gpu):
    on_a_gpu["triton"] = 1.0
    with pytest.raises(ConfigError, match="attention triton fails its self-test on this machine"):
        choose("auto")


def test_flash_attention_is_for_half_precision(on_a_gpu):
    assert choose("auto", dtype=torch.float32) == ("triton", None)
    with pytest.raises(ConfigError, match="attention flash takes bfloat16 and float16, not float32"):
        choose("flash", dtype=torch.float32)


def test_flash_attention_that_is_not_installed_is_refused_if_it_was_asked_for(on_a_gpu, monkeypatch):
    def missing(device: torch.device) -> Any:
        raise FlashUnavailableError("nothing is installed")

    monkeypatch.setattr(attention_choice, "find_flash", missing)
    assert choose("auto") == ("triton", None)
    with pytest.raises(ConfigError, match="attention flash: nothing is installed"):
        choose("flash")


def promised(layout: AttentionLayout) -> str:
    """The layout's pattern, after a look at whether its staircase has it."""
    capacity = layout.page_table.shape[1] * (layout.page_size or 1)
    for first, last in pairwise(layout.query_start.tolist()):
        seen = layout.visible[first:last].tolist()
        live = len([end for end in seen if end])
        assert not any(seen[live:]), "queries that see nothing stand at the row's end"
        assert all(end <= capacity for end in seen)
        if layout.pattern == "causal":
            assert seen[:live] == list(range(seen[0], seen[0] + live)) if live else True
        if layout.pattern == "block":
            assert len(set(seen[:live])) <= 1
    if layout.pattern != "any":
        assert not layout.visible[int(layout.query_start[-1]) :].any(), "nor does what stands behind the rows"
    return layout.pattern


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("causal", {"causal", "any"}),  # with recycled drafts there is scratch
        ("wedlm", {"causal"}),
        ("llada", {"block"}),
        ("dream", {"block"}),
        ("fast_dllm_v2", {"any"}),
        ("sdar", {"any"}),
    ],
)
def test_a_forwards_staircase_has_the_pattern_that_it_promises(family, patterns, rounding):
    core = engine(family)
    core.runner.rounding = rounding
    found = set()
    forward = core.runner.decoder.forward

    def looked_at(ids: Any, positions: Any, slots: Any, cache: Any, layout: AttentionLayout, *more: Any) -> Any:
        found.add(promised(layout))
        return forward(ids, positions, slots, cache, layout, *more)

    core.runner.decoder.forward = looked_at  # type: ignore[method-assign]
    if family in ("causal", "fast_dllm_v2", "sdar"):
        run(core, mixed_requests(core, family))
    else:
        run(core, [request(core, str(n), prompt_of(n, seed=n), 20) for n in (5, 17, 40)], gap=2)
    assert found == patterns
