"""A model that two processes hold together says what it says in one, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from converted import converted_folder
from plain_llada22 import llada22
from rank_pair import RankPair, golden_results, some_cases, texts

from linocut.engine.parallel.ranks import ALONE

# Settings of strategies beside those of every family's tests.
EXTRA: dict[str, dict[str, list[dict[str, Any]]]] = {
    "llada": {"threshold": [{"threshold": 0.3, "smoothing": 0.5, "block_length": 6}, {"threshold": 0.3}]},
    "converted": {
        "verify": [{"row_cost": 0.0}, {"draft_length": 5}, {"draft_length": 1, "row_cost": 0.0}],
        "static": [{"denoising_steps": 2}, {"order": "margin"}],
        "hierarchical": [{"threshold": 0.6, "low_threshold": 0.3}],
    },
}
FAMILIES = ("sdar", "sdar_moe", "llada2", "llada", "dream", "wedlm", "causal", "fast_dllm_v2")
# Every how manieth decoding case is replayed: all of them take minutes.
GOLDEN = {
    "sdar": 12,
    "sdar_moe": 12,
    "llada2": 12,
    "llada": 12,
    "dream": 12,
    "wedlm": 8,
    "wedlm_bias": 12,
    "jacobi_qwen2": 12,
    "fast_dllm_v2": 12,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    pair = RankPair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_say_what_one_says(pair: RankPair, family: str) -> None:
    extra = EXTRA.get(family, {})
    alone = texts(ALONE, family, extra, {})
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > 3, "texts to compare"
    assert pair.run(texts, family, extra, {}) == alone


@pytest.mark.parametrize("draft_head", [None, 0.2])
def test_two_ranks_share_a_gated_model_and_its_draft_head(
    pair: RankPair, tmp_path: Path, draft_head: float | None
) -> None:
    model = {"model": str(converted_folder(tmp_path / "model", draft_head=draft_head)), "plain": True}
    alone = texts(ALONE, "causal", EXTRA["converted"], model)
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > 3, "texts to compare"
    assert pair.run(texts, "causal", EXTRA["converted"], model) == alone
    assert pair.run(texts, "causal", EXTRA["converted"], model, 10**6) == alone, "one product for texts and drafts"


def test_two_ranks_choose_the_same_experts_for_a_block(pair: RankPair, tmp_path: Path) -> None:
    llada22(tmp_path)
    extra = {"levenshtein": [{"threshold": 0.3, "edit_threshold": 0.1}]}
    alone = texts(ALONE, "llada2", extra, {"model": str(tmp_path)})
    assert len({tuple(tokens) for tokens, _ in alone.values()}) > 3, "texts to compare"
    assert pair.run(texts, "llada2", extra, {"model": str(tmp_path)}) == alone


@pytest.mark.parametrize("family", GOLDEN)
def test_two_ranks_decide_what_the_family_s_own_code_decides(
    pair: RankPair, golden: Path, tmp_path: Path, family: str
) -> None:
    keep = {"forward_cases": 2, "decode_cases": GOLDEN[family], "ar_cases": 8, "batch_cases": 8}
    folder = some_cases(golden / family, tmp_path / family, keep)
    results = pair.run(golden_results, folder)
    assert {r.case: r.detail for r in results if r.outcome == "fail"} == {}
    assert len(results) > 2
