"""The golden folders: what the authors' own code computes, replayed through the paged engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linocut.engine.conformance.fixture import Result
from linocut.engine.conformance.run import conformance, run_fixture
from linocut.engine.errors import ModelError

FAMILIES = ("fast_dllm_v2", "sdar", "jacobi_qwen2")
# Quirks of a reference that are deliberately not followed; nothing else may differ.
KNOWN = {"fast_dllm_v2": {"quirk_prompt_exactly_one_block", "batch_mixed_prefill"}}
KINDS = ("forward_cases", "ar_cases", "decode_cases", "batch_cases")

Edit = Callable[[dict[str, Any], Path], None]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_passes_or_is_a_known_difference(golden: Path, family: str) -> None:
    results = run_fixture(golden / family)
    assert results is not None
    named = json.loads((golden / family / "golden.json").read_text())
    assert [r.case for r in results] == [case["name"] for kind in KINDS for case in named.get(kind, [])]
    assert {r.case: r.detail for r in results if r.outcome == "fail"} == {}
    assert {r.case for r in results if r.outcome == "known difference"} == KNOWN.get(family, set())


def test_every_known_difference_says_why(golden: Path, tmp_path: Path) -> None:
    for case in KNOWN["fast_dllm_v2"]:
        (result,) = run_one(golden / "fast_dllm_v2", tmp_path / case, case)
        assert result.outcome == "known difference"
        assert "the reference" in result.detail


# ---------------------------------------------------------------------- a test that cannot fail is a defect


def one_logit(case: dict[str, Any], folder: Path) -> None:
    path = folder / "golden.safetensors"
    tensors = load_file(path)
    tensors[case["logits"]][-1, 5] += 1e-3
    save_file(tensors, path)


def one_row_too_many(case: dict[str, Any], folder: Path) -> None:
    path = folder / "golden.safetensors"
    tensors = load_file(path)
    tensors[case["logits"]] = torch.cat([tensors[case["logits"]], tensors[case["logits"]][-1:]])
    save_file(tensors, path)


def another_id(token: int) -> int:
    return (token + 1) % 300


def output_token(case: dict[str, Any], folder: Path) -> None:
    case["output"][len(case["output"]) // 2] = another_id(case["output"][len(case["output"]) // 2])


def output_cut(case: dict[str, Any], folder: Path) -> None:
    case["output"].pop()


def served_token(case: dict[str, Any], folder: Path) -> None:
    case["served"][-1] = another_id(case["served"][-1])


def greedy_text(case: dict[str, Any], folder: Path) -> None:
    case["ar_output"][1] = another_id(case["ar_output"][1])


def batch_token(case: dict[str, Any], folder: Path) -> None:
    place = len(case["prompts"][0]) + 1
    case["outputs"][0][place] = another_id(case["outputs"][0][place])


def traced_token(case: dict[str, Any], folder: Path) -> None:
    changes = [step["set"] for step in case["steps"] if step["set"]][-1]
    changes[0][1] = another_id(changes[0][1])


def traced_order(case: dict[str, Any], folder: Path) -> None:
    first, second = case["steps"][0], case["steps"][1]
    first["set"], second["set"] = second["set"], first["set"]


def forgotten_step(case: dict[str, Any], folder: Path) -> None:
    del case["steps"][-1]


def next_draft(case: dict[str, Any], folder: Path) -> None:
    """What the model said of the rejected positions."""
    case["steps"][0]["greedy"][-1] = another_id(case["steps"][0]["greedy"][-1])


CORRUPTIONS: list[tuple[str, str, Edit]] = [
    ("fast_dllm_v2", "prefill_len33", one_logit),
    ("fast_dllm_v2", "block_past32_tail1", one_logit),
    ("fast_dllm_v2", "block_past32_rand20_sub", one_logit),
    ("fast_dllm_v2", "prefill_len8", one_row_too_many),
    ("fast_dllm_v2", "thr0.7_len20", output_token),
    ("fast_dllm_v2", "thr0.7_len20", output_cut),
    ("fast_dllm_v2", "thr0.7_len20", traced_token),
    ("fast_dllm_v2", "blockcache_thr0.6_len9", traced_order),
    ("fast_dllm_v2", "stop_as_seed", forgotten_step),
    ("fast_dllm_v2", "quirk_zero_blocks_aligned", output_token),
    ("fast_dllm_v2", "batch_ragged", batch_token),
    ("fast_dllm_v2", "batch_equal", batch_token),
    ("sdar", "prefill_len21_b8", one_logit),
    ("sdar", "block_past16_b4_tail1", one_logit),
    ("sdar", "b4_thr0.9_len5", output_token),
    ("sdar", "b4_static_steps2_len9", traced_token),
    ("sdar", "b16_thr0.8_len18", traced_order),
    ("sdar", "generate_py_sequential_len6", forgotten_step),
    ("sdar", "cut_gen10_b4_len7", served_token),
    ("jacobi_qwen2", "prefill_len8", one_logit),
    ("jacobi_qwen2", "ar_len5", output_token),
    ("jacobi_qwen2", "L16_len12_guess", greedy_text),
    ("jacobi_qwen2", "L16_len12_guess", traced_token),
    ("jacobi_qwen2", "L16_len12", next_draft),
]


@pytest.mark.parametrize(
    ("family", "case", "edit"), CORRUPTIONS, ids=[f"{f}-{c}-{e.__name__}" for f, c, e in CORRUPTIONS]
)
def test_a_case_that_passes_fails_once_its_fixture_is_corrupted(
    golden: Path, tmp_path: Path, family: str, case: str, edit: Edit
) -> None:
    (result,) = run_one(golden / family, tmp_path / "corrupted", case, edit)
    assert result.outcome == "fail"
    assert result.detail


@pytest.mark.parametrize("family", FAMILIES)
def test_as_it_is_such_a_case_passes(golden: Path, tmp_path: Path, family: str) -> None:
    """Also when it stands alone in its folder, as above."""
    case = next(case for name, case, edit in CORRUPTIONS if name == family and edit is traced_token)
    (result,) = run_one(golden / family, tmp_path / "as it is", case)
    assert (result.outcome, result.detail) == ("pass", "")


def test_corrupted_weights_fail(golden: Path, tmp_path: Path) -> None:
    def edit(case: dict[str, Any], folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.self_attn.v_proj.weight"][0] += 0.01
        save_file(tensors, folder / "model.safetensors")

    (result,) = run_one(golden / "sdar", tmp_path / "sdar", "prefill_len5_b4", edit)
    assert result.outcome == "fail"


# ---------------------------------------------------------------------- exit statuses


def test_status_0_when_all_cases_pass(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(golden / "sdar", tmp_path / "sdar", "prefill_len5_b4")
    assert conformance(folder, "cpu") == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out


def test_status_0_for_a_known_difference_which_is_shown(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(golden / "fast_dllm_v2", tmp_path / "v2", "quirk_prompt_exactly_one_block")
    assert conformance(folder, "cpu") == 0
    shown = capsys.readouterr().out
    assert "0 passed, 0 failed, 1 known difference" in shown
    assert "known difference quirk_prompt_exactly_one_block" in " ".join(shown.split())


def test_status_1_when_a_case_fails(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(golden / "sdar", tmp_path / "sdar", "prefill_len5_b4", one_logit)
    assert conformance(folder, "cpu") == 1
    assert "0 passed, 1 failed" in capsys.readouterr().out


def test_status_2_for_a_family_that_is_not_built_which_has_not_passed(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(golden / "sdar", tmp_path / "unheard_of", "prefill_len5_b4", family="unheard_of")
    assert run_fixture(folder) is None
    assert conformance(folder, "cpu") == 2
    shown = capsys.readouterr().out
    assert "unheard_of" in shown
    assert "1 cases were not run" in shown
    assert "passed" not in shown


def test_a_folder_without_fixtures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"golden\.json"):
        run_fixture(tmp_path)


# ---------------------------------------------------------------------- helpers


def folder_of(source: Path, target: Path, case: str, edit: Edit | None = None, family: str | None = None) -> Path:
    """A copy of a golden folder that holds one case, changed by `edit`."""
    shutil.copytree(source, target)
    meta = json.loads((source / "golden.json").read_text())
    for kind in KINDS:
        meta[kind] = [c for c in meta.get(kind, []) if c["name"] == case]
    (kept,) = [c for kind in KINDS for c in meta[kind]]
    if family:
        meta["family"] = family
    if edit:
        edit(kept, target)
    (target / "golden.json").write_text(json.dumps(meta))
    return target


def run_one(source: Path, target: Path, case: str, edit: Edit | None = None) -> list[Result]:
    results = run_fixture(folder_of(source, target, case, edit))
    assert results is not None
    return results
