"""Golden cases of pure functions: logits or states in, decisions out, without a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linocut.engine.conformance.fixture import Fixture, Result
from linocut.engine.conformance.run import run_fixture

KINDS = {
    "commit_rules": ("rule_cases", "credit_cases", "sched_threshold_cases", "sched_stat_cases"),
    "freedave": ("verify_cases", "transfer_cases"),
}


def results_of(golden: Path, target: Path, family: str, edit: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """The results of the pure functions of a golden folder, its golden.json changed by `edit`."""
    shutil.copytree(golden / family, target)
    meta = json.loads((golden / family / "golden.json").read_text())
    for kind in [name for name in meta if name.endswith("_cases") and name not in KINDS[family]]:
        del meta[kind]
    meta.pop("lossless_groups", None)
    if edit:
        edit(meta)
    (target / "golden.json").write_text(json.dumps(meta))
    results = run_fixture(target)
    assert results is not None
    return results, Fixture(target).case_count


@pytest.mark.parametrize("family", KINDS)
def test_every_case_is_replayed_and_none_fails(golden: Path, tmp_path: Path, family: str) -> None:
    results, count = results_of(golden, tmp_path / family, family)
    assert len(results) == count
    assert {r.case: r.detail for r in results if r.outcome == "fail"} == {}


def differing(results: list[Result], kind: str) -> set[str]:
    return {r.case for r in results if r.outcome == "known difference" and r.case.startswith(kind)}


def test_remasking_differs_only_where_the_mask_id_is_a_guess(golden: Path, tmp_path: Path) -> None:
    results, _ = results_of(golden, tmp_path / "rules", "commit_rules")
    remasking = [r for r in results if r.case.startswith("dinfer_hierarchy_remask")]
    assert len(remasking) == 36
    scene6 = {f"dinfer_hierarchy_remask-{index}" for index in (186, 189, 192, 195)}
    assert differing(results, "dinfer_hierarchy_remask") == scene6


def test_freedave_differs_only_by_rules_that_are_not_its_own(golden: Path, tmp_path: Path) -> None:
    results, _ = results_of(golden, tmp_path / "freedave", "freedave")
    assert differing(results, "verify") == {"verify-21", "verify-35"}
    assert differing(results, "transfer") == {f"transfer-{index}" for index in (2, 7, 14, 22)}


def another_remask(meta: dict[str, Any]) -> None:
    case = next(c for c in meta["rule_cases"] if c["params"]["rule"] == "dinfer_hierarchy_remask")
    case["changed"].pop()


def another_branch(meta: dict[str, Any]) -> None:
    case = next(c for c in meta["verify_cases"] if c["rule"] == "exact_match")
    case["accepted"] += 1


def another_draft(meta: dict[str, Any]) -> None:
    meta["transfer_cases"][0]["drafts"][0][1] += 1


@pytest.mark.parametrize(
    ("family", "edit"), [("commit_rules", another_remask), ("freedave", another_branch), ("freedave", another_draft)]
)
def test_a_corrupted_case_fails(
    golden: Path, tmp_path: Path, family: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    results, _ = results_of(golden, tmp_path / family, family, edit)
    assert [r.outcome for r in results].count("fail") == 1
