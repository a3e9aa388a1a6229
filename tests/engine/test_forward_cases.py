"""Logits of every golden checkpoint through the paged decoder: alone and beside a stranger, on scattered pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from linocut.engine.conformance.fixture import Fixture
from linocut.engine.conformance.forward import run_forward_cases

# How many forward cases each folder has: a folder that lost some would pass unseen.
CASES = {
    "fast_dllm_v2": 15,
    "sdar": 14,
    "sdar_moe": 14,
    "jacobi_qwen2": 4,
    "llada2": 11,
    "llada21": 11,
    "llada": 13,
    "dream": 13,
    "wedlm": 13,
    "wedlm_bias": 13,
}


@pytest.mark.parametrize("family", CASES)
def test_logits_are_the_authors(golden: Path, family: str) -> None:
    results = run_forward_cases(Fixture(golden / family))
    assert {r.case: r.detail for r in results if r.outcome != "pass"} == {}
    assert len(results) == CASES[family]


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("sdar_moe", "block_past4_b4_tail0"),
        ("llada2", "block_past64_b32_rand12"),
        ("llada", "canvas_len13_gen32"),
        ("llada", "canvas_len13_gen32_prefix"),
        ("dream", "canvas_len13_gen32_dual"),
        ("wedlm", "window_len13_w8_step2"),
    ],
)
def test_a_case_fails_once_a_logit_is_off(golden: Path, tmp_path: Path, family: str, case: str) -> None:
    """As much as 0.001, in the last row."""
    folder = tmp_path / family
    shutil.copytree(golden / family, folder)
    meta: dict[str, Any] = json.loads((folder / "golden.json").read_text())
    meta["forward_cases"] = [c for c in meta["forward_cases"] if c["name"] == case]
    (folder / "golden.json").write_text(json.dumps(meta))
    tensors = load_file(folder / "golden.safetensors")
    assert [r.outcome for r in run_forward_cases(Fixture(folder))] == ["pass"]
    tensors[meta["forward_cases"][0]["logits"]][-1, 5] += 1e-3
    save_file(tensors, folder / "golden.safetensors")
    (result,) = run_forward_cases(Fixture(folder))
    assert result.outcome == "fail"
    assert "largest error" in result.detail
