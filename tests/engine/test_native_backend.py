"""When an engine runs on the kernels in C, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from linocut.engine import attention_choice, loading
from linocut.engine.config import EngineConfig
from linocut.engine.errors import ConfigError


def attention(golden: Path, **fields: object) -> str:
    config = EngineConfig(model=str(golden / "sdar"), device="cpu", **fields)
    return loading.load_model(config).info.attention


def test_float32_on_a_cpu_takes_them_where_they_can_be_had(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "load_native", lambda cache: True)
    # On a machine that has none of them, there is nothing to try.
    monkeypatch.setattr(attention_choice, "attention_error", lambda *_: 0.0)
    assert attention(golden, dtype="float32", random_weights=True) == "native"
    assert attention(golden, dtype="float32", random_weights=True, attention="torch") == "torch"
    assert attention(golden, dtype="bfloat16", random_weights=True) == "torch"


def test_torch_serves_without_a_compiler(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "load_native", lambda cache: False)
    assert attention(golden, dtype="float32") == "torch"
    with pytest.raises(ConfigError, match="a C compiler"):
        attention(golden, dtype="float32", attention="native")


def test_other_numbers_are_refused(golden: Path) -> None:
    with pytest.raises(ConfigError, match="float32 on a CPU"):
        attention(golden, dtype="bfloat16", attention="native")
