"""What the engine counts of its steps is what happened in them."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_engines import engine, prompt_of, request, run

from linocut.engine.histogram import BOUNDS, Distribution
from linocut.engine.messages import EngineStats


def served(family: str, diffusion: dict[str, Any], *, tokens: int = 24, **overrides: Any) -> EngineStats:
    core = engine(family, **overrides)
    run(core, [request(core, str(n), prompt_of(9 + 5 * n, seed=n), tokens, diffusion) for n in range(3)])
    return core.stats()


def observed(distribution: Distribution) -> int:
    return sum(distribution.counts)


@pytest.mark.parametrize(
    ("family", "diffusion"),
    [
        ("sdar", {"strategy": "threshold"}),
        ("sdar16", {"strategy": "static", "denoising_steps": 3}),
        ("fast_dllm_v2", {"strategy": "threshold", "threshold": 0.02}),
        ("wedlm", {"strategy": "reorder"}),
        ("causal", {"strategy": "jacobi"}),
        ("llada", {"strategy": "threshold"}),
        ("sdar", {"strategy": "edit"}),
    ],
)
def test_every_decided_position_has_a_reason_and_is_text_or_discarded(family: str, diffusion: dict[str, Any]) -> None:
    stats = served(family, diffusion)
    assert stats.committed_tokens == 3 * 24
    assert sum(stats.commits_by_reason.values()) == stats.committed_tokens + stats.discarded_tokens


def test_a_threshold_that_nothing_passes_commits_by_the_floor_and_one_that_all_pass_by_the_rule() -> None:
    never = served("sdar", {"strategy": "threshold", "threshold": 1.0}).commits_by_reason
    always = served("sdar", {"strategy": "threshold", "threshold": 0.0}).commits_by_reason
    assert (never["rule"], always["floor"]) == (0, 0)
    assert never["floor"] == sum(never.values()) > 0
    assert always["rule"] == sum(always.values()) > 0


def test_a_rule_that_decides_nothing_leaves_it_to_the_guard() -> None:
    commits = served("sdar", {"strategy": "entropy", "entropy": 0.0}).commits_by_reason
    assert commits["floor"] == sum(commits.values()) > 0


def test_a_block_that_halts_says_so() -> None:
    loose = {"halt": "linear", "halt_high": 0.0, "halt_low": 0.0, "halt_change": 1.0}
    commits = served("sdar16", {"strategy": "static", **loose}).commits_by_reason
    assert commits["halt"] > 0
    assert served("sdar16", {"strategy": "static"}).commits_by_reason["halt"] == 0


def test_the_first_position_of_a_shifted_block_is_a_clean_rows() -> None:
    stats = served("fast_dllm_v2", {"strategy": "threshold"}, tokens=64)
    # Texts start inside a block; of the blocks behind it, each has one.
    assert 3 <= stats.commits_by_reason["clean"] <= 9


def test_autoregressive_text_is_all_clean_and_jacobis_drafts_are_counted() -> None:
    plain = served("causal", {"strategy": "autoregressive"})
    assert plain.commits_by_reason["clean"] == plain.committed_tokens
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    drafted = served("causal", {"strategy": "jacobi", "draft_length": 4})
    assert 0 < drafted.accepted_tokens < drafted.drafted_tokens
    assert drafted.accepted_tokens == drafted.commits_by_reason["draft"]
    # Each of a choice's forwards decides one token by itself.
    assert drafted.commits_by_reason["clean"] == drafted.committed_tokens - drafted.accepted_tokens


def test_edits_are_counted() -> None:
    assert served("sdar", {"strategy": "edit", "edit_threshold": 0.0}).edited_tokens > 0
    assert served("sdar", {"strategy": "edit", "edit_threshold": 1.0}).edited_tokens == 0


def test_a_schedule_of_four_steps_takes_four_forwards_a_block() -> None:
    stats = served("sdar", {"strategy": "static", "denoising_steps": 4}, tokens=27)
    four = BOUNDS["steps_per_block"].index(4)
    counts = stats.steps_per_block.counts
    # A text's first block holds the end of its prompt.
    assert sum(counts[four + 1 :]) == 0
    assert counts[four] >= observed(stats.steps_per_block) - 3
    assert observed(stats.steps_per_block) == stats.blocks_finished > 9
    assert observed(stats.block_seconds) == stats.blocks_finished - 3


def test_a_frontier_has_no_blocks() -> None:
    stats = served("causal", {"strategy": "jacobi"})
    assert (stats.blocks_finished, observed(stats.steps_per_block), observed(stats.block_seconds)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("family", "caching", "plain"),
    [
        ("fast_dllm_v2", {"sub_block_cache": True}, {"sub_block_cache": False}),
        ("llada", {"cache": "dual"}, {"cache": "none"}),
        ("dream", {"cache": "prefix"}, {"cache": "none"}),
    ],
)
def test_stale_blocks_and_their_refreshes_are_counted(
    family: str, caching: dict[str, Any], plain: dict[str, Any]
) -> None:
    stats = served(family, {"strategy": "static", **caching})
    assert stats.cached_rows > 0
    assert stats.refreshed_rows >= 3
    without = served(family, {"strategy": "static", **plain})
    assert (without.cached_rows, without.refreshed_rows) == (0, 0)


def test_forwards_are_told_apart_by_what_their_rows_did() -> None:
    core = engine("sdar16", budget=32)
    run(core, [request(core, "a", prompt_of(100), 40, {"strategy": "static"})])
    stats = core.stats()
    kinds = stats.forwards_by_kind
    # 96 clean positions in chunks of 32, the last of which runs beside the first block.
    assert kinds["prefill"] >= 2
    assert kinds["denoise"] > kinds["mixed"] >= 2  # later blocks are committed by the forward that opens the next one
    assert stats.forwards == observed(stats.forward_rows) == observed(stats.forward_positions)
    assert stats.forward_rows.total == stats.forwards
    ran = stats.prefill_positions + stats.commit_positions + stats.denoise_positions
    assert stats.forward_positions.total == ran


def test_the_host_gap_is_between_forwards_and_not_over_idle_times() -> None:
    core = engine("sdar")
    for name in ("a", "b"):
        run(core, [request(core, name, prompt_of(6), 8)])
    stats = core.stats()
    assert observed(stats.forward_seconds) == stats.forwards
    assert observed(stats.host_gap_seconds) == stats.forwards - 2


def test_a_choice_that_waits_is_seen_to_wait() -> None:
    core = engine("sdar", max_running=1)
    for name in ("a", "b"):
        core.add(request(core, name, prompt_of(6), 8))
    outputs = core.step()
    assert core.stats().oldest_waiting_seconds > 0
    times = {}
    while core.busy:
        outputs += core.step()
    for output in outputs:
        times.setdefault(output.request_id, (output.queue_seconds, output.prefill_seconds))
        assert times[output.request_id] == (output.queue_seconds, output.prefill_seconds)
    assert times["b"][0] > times["a"][0] + times["a"][1]
    assert min(times["a"][1], times["b"][1]) > 0
    assert core.stats().oldest_waiting_seconds == 0
