"""What the scheduler shares between sequences: exactly the prefixes they have in common, whole units of them."""

from __future__ import annotations

import pytest
from fake_device import BLOCKS, CAUSAL, SHIFTED, Geometry
from harness import Harness

from linocut.engine.cache.prefix import PrefixCache
from linocut.engine.sequence import Status


def hit(geometry: Geometry, page_size: int, length: int) -> int:
    """cached_tokens of a prompt that was served before."""
    harness = Harness(geometry, page_size=page_size, pages=100, budget=200)
    prompt = [i % 7 for i in range(length)]
    harness.add(prompt, max_tokens=1)
    harness.drain_requests()
    (again,) = harness.add(prompt, max_tokens=1)
    harness.drain_requests()
    return again.cached_tokens


@pytest.mark.parametrize(
    ("geometry", "page_size", "length", "cached"),
    [
        (CAUSAL, 8, 7, 0),
        (CAUSAL, 8, 8, 0),  # the row of the last token yields the first logits
        (CAUSAL, 8, 9, 8),
        (CAUSAL, 8, 40, 32),
        (BLOCKS, 8, 8, 0),
        (BLOCKS, 8, 9, 8),
        (BLOCKS, 8, 16, 8),
        (BLOCKS, 8, 19, 16),
        (BLOCKS, 2, 7, 4),  # a unit is a whole block, although its pages are smaller
        (Geometry(12), 8, 47, 24),  # lcm(12, 8)
        (Geometry(12), 8, 49, 48),
        (Geometry(32, shifted=True), 16, 64, 32),
        (Geometry(32, shifted=True), 16, 65, 64),
    ],
)
def test_a_prefix_hit_is_the_most_whole_units_short_of_the_prompts_last_one(
    geometry: Geometry, page_size: int, length: int, cached: int
) -> None:
    assert hit(geometry, page_size, length) == cached


def test_prompts_share_exactly_the_units_they_have_in_common() -> None:
    harness = Harness(BLOCKS, page_size=4, pages=100)
    harness.add([1] * 40, max_tokens=1)
    harness.drain_requests()
    (fork,) = harness.add([1] * 18 + [2] * 22, max_tokens=1)
    (other,) = harness.add([2] + [1] * 39, max_tokens=1)
    harness.drain_requests()
    assert (fork.cached_tokens, other.cached_tokens) == (16, 0)


def test_tenants_with_different_salts_share_nothing() -> None:
    harness = Harness(BLOCKS, page_size=4, pages=100)
    for salt, cached in (("a", 0), ("b", 0), ("a", 16), ("", 0)):
        (sequence,) = harness.add([1] * 18, max_tokens=1, salt=salt)
        harness.drain_requests()
        assert sequence.cached_tokens == cached


def test_the_answer_is_shared_too_once_its_blocks_are_committed() -> None:
    harness = Harness(BLOCKS, page_size=4, pages=100)
    (first,) = harness.add([1] * 4, max_tokens=20)
    harness.drain_requests()
    (second,) = harness.add([*first.tokens, 5, 6], max_tokens=4)
    harness.drain_requests()
    # The last block never ran clean, because the request had ended.
    assert second.cached_tokens == 20


def test_when_pages_run_short_the_end_of_a_cached_text_is_forgotten_before_its_beginning() -> None:
    harness = Harness(BLOCKS, page_size=4, pages=100)
    harness.add([1] * 42, max_tokens=1)
    harness.drain_requests()
    for cached in (32, 24, 4):
        harness.prefix.evict(harness.pool.total - cached // 4)
        (again,) = harness.add([1] * 42, max_tokens=1)
        harness.step()
        assert again.cached_tokens == cached
        harness.abort(again)


@pytest.mark.parametrize("geometry", [BLOCKS, SHIFTED, CAUSAL])
def test_further_choices_of_a_prompt_wait_for_its_prefix_and_share_it(geometry: Geometry) -> None:
    harness = Harness(geometry, page_size=4, pages=100, budget=18)
    leader, *others = harness.add([1] * 37, max_tokens=4, n=4)
    (stranger,) = harness.add([2] * 3, max_tokens=1)
    while leader.prefilling or leader.status is Status.WAITING:
        harness.step()
        assert all(s.status is Status.WAITING for s in others) or not leader.prefilling
    harness.drain_requests()
    assert leader.cached_tokens == 0
    # All but the leader's last chunk, which may still be under way when they start.
    assert all(s.cached_tokens >= 32 for s in others)
    assert stranger.finish


def test_choices_go_on_when_their_first_one_is_aborted() -> None:
    harness = Harness(BLOCKS, budget=8)
    leader, other = harness.add([1] * 37, max_tokens=4, n=2)
    harness.step()
    harness.abort(leader)
    harness.drain()
    assert other.finish == "length"


def test_without_prefix_caching_choices_start_at_once_and_nothing_is_shared() -> None:
    harness = Harness(BLOCKS, caching=False, budget=200)
    choices = harness.add([1] * 37, max_tokens=4, n=3)
    harness.step()
    assert all(s.status is Status.RUNNING for s in choices)
    harness.drain()
    assert [s.cached_tokens for s in choices] == [0, 0, 0]


def test_without_prefix_caching_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(BLOCKS, caching=False, budget=200)
    monkeypatch.delattr(PrefixCache, "next_key")
    (sequence,) = harness.add([1] * 37, max_tokens=40)
    harness.drain()
    assert sequence.finish == "length"


def test_a_preempted_sequence_finds_what_is_left_of_its_pages() -> None:
    found = 0
    for pages in range(9, 24):
        harness = Harness(BLOCKS, pages=pages, page_size=4, caching=True)
        for token in (1, 2, 3):
            harness.add([token] * 12, max_tokens=20)
        harness.drain_requests()
        found += harness.prefix.hit_tokens > 0
        assert harness.scheduler.counters.preemptions > 0 or not harness.prefix.hit_tokens
        assert all(s.cached_tokens == 0 for s in harness.sequences), "own pages are no prefix hit of the prompt"
    assert found > 0


@pytest.mark.parametrize("draft", [2, 5, 9])
def test_what_was_accepted_behind_a_stop_id_is_not_shared(draft: int) -> None:
    """A unit that reaches past the end of the text could never be found again; it would only hold pages."""
    for seed in range(30):
        harness = Harness(CAUSAL, page_size=2, seed=seed, stop_rate=0.3)
        (sequence,) = harness.add([1] * 5, max_tokens=30, draft_length=draft)
        harness.drain_requests()
        assert harness.prefix.idle_pages <= len(sequence.tokens) // 2
