"""The scheduler, without a model: whatever arrives, fits or goes away, every request ends once and no page is lost."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from fake_device import BLOCKS, CAUSAL, SHIFTED, STOP, Geometry
from harness import Harness
from hypothesis import given
from hypothesis import strategies as st

from linocut.engine import forecast
from linocut.engine.sequence import Sequence, Status

LONGEST = 40  # prompt and answer together, in the generated scripts
LONGEST_DRAFT = 9

geometries = st.one_of(
    st.builds(Geometry, block=st.sampled_from([1, 2, 3, 4, 8, 12]), shifted=st.booleans()),
    st.just(CAUSAL),
)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(1, LONGEST - 1),  # of the prompt
            st.integers(1, LONGEST),  # max_tokens
            st.sampled_from([1, 1, 1, 2, 4]),  # n
            st.integers(0, 2),  # which of a few prefixes the prompt begins with
            st.integers(0, LONGEST),  # where it leaves that prefix
            st.sampled_from(["", "", "tenant"]),
            st.integers(0, 3),  # strategy and its parameters
        ),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    min_size=3,
    max_size=40,
)


@st.composite
def harnesses(draw: st.DrawFn) -> Harness:
    """Engines of every geometry, most of them short of something."""
    geometry = draw(geometries)
    page_size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    # load_model: the longest request fits the pool by itself, its last block included.
    least = -(-(LONGEST + geometry.block) // page_size)
    widest = max(2 * geometry.block, LONGEST_DRAFT if geometry.causal else 1)
    return Harness(
        geometry,
        pages=least + draw(st.integers(0, 2 * least)),
        page_size=page_size,
        max_running=draw(st.integers(1, 6)),
        budget=widest + draw(st.sampled_from([0, 1, 3, 17, 200])),
        caching=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        stop_rate=draw(st.sampled_from([0.0, 0.0, 0.1])),
        ahead=draw(st.booleans()),
        row_share=draw(st.sampled_from([0.003, 1.0])),
    )


def parameters(geometry: Geometry, kind: int) -> dict[str, int | bool]:
    if geometry.causal:
        return {"draft_length": (1, 2, 4, LONGEST_DRAFT)[kind]}
    halves = geometry.block % 2 == 0 and kind >= 2
    return {"sub_block_size": geometry.block // 2 if halves else geometry.block, "sub_block_cache": kind == 3}


@given(harnesses(), operations)
def test_any_script_of_requests_and_aborts_keeps_the_invariants_and_ends(
    harness: Harness, script: list[tuple[Any, ...]]
) -> None:
    follow(harness, script)


def test_so_does_a_heavy_load_that_meets_every_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random scripts denser than the ones above, so that each of the scheduler's answers is known to be covered."""
    preempted = hits = aborted = stopped = idle = cut = 0
    foresee = forecast._finishing
    for seed in range(120):
        # Half of the plans that are made ahead expect no block to be finished.
        monkeypatch.setattr(forecast, "_finishing", foresee if seed % 4 == 1 else lambda sequence: 0.0)
        rng = random.Random(seed)
        geometry = rng.choice([Geometry(rng.choice([1, 3, 4, 8, 12]), rng.random() < 0.5), CAUSAL])
        page_size = rng.choice([1, 2, 4, 8, 16])
        harness = Harness(
            geometry,
            pages=-(-(LONGEST + geometry.block) // page_size) + rng.choice([0, 1, 5, 20]),
            page_size=page_size,
            max_running=rng.randint(2, 6),
            budget=max(2 * geometry.block, LONGEST_DRAFT) + rng.choice([0, 1, 5, 60]),
            caching=rng.random() < 0.7,
            seed=seed,
            stop_rate=rng.choice([0.0, 0.02]),
            ahead=seed % 2 == 1,
            row_share=rng.choice([0.003, 1.0]),
        )
        script: list[tuple[Any, ...]] = []
        for _ in range(12):
            length = rng.randint(1, LONGEST - 4)
            script.append(
                (
                    "add",
                    length,
                    LONGEST,
                    rng.choice([1, 1, 3]),
                    rng.randrange(2),
                    rng.randint(0, 40),
                    "",
                    rng.randrange(4),
                )
            )
            script.append(("step", rng.randint(1, 8)))
            if rng.random() < 0.2:
                script.append(("abort", rng.randrange(40)))
        follow(harness, script)
        preempted += harness.scheduler.counters.preemptions > 0
        hits += harness.prefix.hit_tokens > 0
        aborted += bool(harness.aborted)
        stopped += any(s.finish == "stop" for s in harness.sequences)
        idle, cut = idle + (harness.device.idle > 0), cut + (harness.device.cut > 0)
    assert min(preempted, hits, aborted, stopped, idle) > 12, (preempted, hits, aborted, stopped, idle)
    assert cut > 5, "rows had less room than they needed"


def follow(harness: Harness, script: list[tuple[Any, ...]]) -> None:
    """Carry out a script, then step until everything has ended."""
    for name, *values in script:
        if name == "add":
            length, max_tokens, n, base, common, salt, kind = values
            shared = [3 + base + (i * base) % 5 for i in range(common)]
            prompt = (shared + [7 + len(harness.sequences) % 2] * length)[:length]
            if length % 7 == 0:
                prompt[-1] = STOP  # in a prompt it ends nothing
            harness.add(
                prompt,
                min(max_tokens, LONGEST - length),
                n=n,
                salt=salt,
                strategy="ab"[kind % 2],
                **parameters(harness.geometry, kind),
            )
        elif name == "abort" and harness.sequences:
            harness.abort(harness.sequences[values[0] % len(harness.sequences)])
        elif name == "step":
            for _ in range(values[0]):
                harness.step()
    work = sum(s.limit + 2 * harness.geometry.block for s in harness.sequences)
    harness.drain(most=100 + 10 * work)


# ---------------------------------------------------------------------- order and budget


def test_requests_are_admitted_in_the_order_of_arrival() -> None:
    harness = Harness(BLOCKS, max_running=2)
    sequences = [harness.add([1] * 5)[0] for _ in range(5)]
    admitted: list[Sequence] = []
    while harness.scheduler.busy:
        harness.step()
        admitted += [s for s in sequences if (s.status is not Status.WAITING) and s not in admitted]
    assert admitted == sequences


def test_a_large_request_at_the_head_is_not_overtaken_by_a_small_one_that_would_fit() -> None:
    harness = Harness(BLOCKS, pages=12, page_size=4, caching=False)
    (running,) = harness.add([1] * 24, max_tokens=12)
    harness.step()
    (large,), (small,) = harness.add([2] * 32, max_tokens=4), harness.add([3], max_tokens=1)
    harness.step()
    assert running.status is Status.RUNNING
    assert (large.status, small.status) == (Status.WAITING, Status.WAITING)
    harness.drain()


@pytest.mark.parametrize("geometry", [BLOCKS, SHIFTED, CAUSAL])
def test_a_long_prompt_is_prefilled_in_chunks_of_whole_blocks_within_the_budget(geometry: Geometry) -> None:
    harness = Harness(geometry, budget=10, pages=64)
    (sequence,) = harness.add([1] * 37, max_tokens=3)
    widths = [harness.step().rows[0].width for _ in range(4)]
    chunk = 10 // geometry.block * geometry.block
    assert widths == [chunk, chunk, chunk, chunk if geometry is CAUSAL and 37 > 40 else widths[3]]
    assert sequence.final_len >= 3 * chunk
    harness.drain()


def test_rows_that_the_last_forward_had_no_room_for_go_first() -> None:
    harness = Harness(BLOCKS, budget=8, max_running=5)
    for token in range(5):
        harness.add([token], max_tokens=30)
    turns = [0] * 5
    for _ in range(15):
        for row in harness.step().rows:
            turns[row.slot] += 1
    assert max(turns) - min(turns) <= 2, "two of five run in a step, in turn"
    harness.drain()


def test_of_rows_that_waited_equally_long_denoising_ones_go_before_prefill_chunks() -> None:
    harness = Harness(BLOCKS, budget=12)
    (long,) = harness.add([2] * 60, max_tokens=4)
    (short,) = harness.add([1] * 4, max_tokens=12)
    both = 0
    while not short.finish:
        together = long.last_step == short.last_step > 0
        widths = {row.slot: (row.width, row.targets) for row in harness.step().rows}
        if together and short.slot is not None and long.slot is not None:
            both += 1
            assert widths[short.slot][1] > 0, "the denoise step is whole, the chunk takes what is left"
    assert both > 0
    harness.drain()


def test_a_finished_row_leaves_at_once_and_its_slot_goes_to_the_next() -> None:
    harness = Harness(BLOCKS, max_running=2)
    (short,), (long,), (third,) = (harness.add([1] * 4, max_tokens=m) for m in (1, 30, 12))
    while not short.finish:
        harness.step()
    harness.step()
    assert third.status is Status.RUNNING
    assert not long.finish
    harness.drain()


@pytest.mark.parametrize("geometry", [BLOCKS, SHIFTED])
def test_an_old_prompt_makes_progress_however_many_short_requests_keep_arriving(geometry: Geometry) -> None:
    """A budget that is no multiple of the rows' widths leaves a rest no chunk fits in; the rest must not let younger
    requests in, which then stand before the old prompt for ever."""
    harness = Harness(geometry, budget=2 * geometry.block + 2, max_running=6, pages=200)
    for _ in range(3):
        harness.add([1], max_tokens=20)
    (old,) = harness.add([2] * 40, max_tokens=4)
    for _ in range(1000):
        harness.add([3], max_tokens=20)
        harness.step()
        if old.finish:
            break
    assert old.finish, f"{old.final_len} of {old.prompt_len} prompt tokens were prefilled in 1000 steps"


# ---------------------------------------------------------------------- pages


@pytest.mark.parametrize("geometry", [BLOCKS, SHIFTED, CAUSAL])
def test_out_of_pages_the_youngest_is_preempted_and_keeps_its_tokens(geometry: Geometry) -> None:
    harness = Harness(geometry, pages=11, page_size=4, caching=False)
    sequences = [harness.add([1] * 8, max_tokens=24)[0] for _ in range(3)]
    kept: dict[Sequence, list[int]] = {}
    while harness.scheduler.busy:
        before = {s: list(s.tokens) for s in harness.scheduler.running}
        harness.step()
        for sequence, tokens in before.items():
            if sequence.status is Status.WAITING:
                assert sequence.tokens == tokens
                assert not sequence.pages
                kept[sequence] = tokens
    assert harness.scheduler.counters.preemptions > 0
    assert sequences[0] not in kept
    assert all(s.tokens[: len(tokens)] == tokens for s, tokens in kept.items())
    assert any(len(tokens) > 8 for tokens in kept.values()), "somebody was preempted in the middle of an answer"
    harness.check_empty()


@pytest.mark.parametrize("caching", [False, True])
def test_a_preempted_sequence_keeps_its_block_state(caching: bool) -> None:
    restored = 0
    for seed in range(20):
        harness = Harness(Geometry(8), pages=12, page_size=4, caching=caching, seed=seed)
        for prompt in (14, 11, 5):
            harness.add([1] * prompt, max_tokens=30)
        while harness.scheduler.busy:
            kept = [(s, s.start, list(s.window), list(s.decided), s.step) for s in harness.scheduler.waiting]
            for admission in harness.step().admissions:
                ((_, *state),) = [entry for entry in kept if entry[0].tokens is admission.tokens]
                assert [admission.start, admission.window, admission.decided, admission.step] == state
                restored += admission.step > 0
        harness.check_empty()
    assert restored > 0


@pytest.mark.parametrize("geometry", [Geometry(4), Geometry(12), Geometry(32, shifted=True), CAUSAL])
@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_the_longest_request_fits_the_least_pool(geometry: Geometry, page_size: int) -> None:
    pages = -(-(64 + geometry.block) // page_size)
    for prompt in (1, 31, 32, 63):
        harness = Harness(geometry, pages=pages, page_size=page_size, budget=80)
        harness.add([1] * prompt, max_tokens=64 - prompt)
        harness.drain()
        assert harness.scheduler.counters.preemptions == 0


def test_nobody_is_admitted_onto_the_pages_that_the_running_need_next() -> None:
    harness = Harness(BLOCKS, pages=8, page_size=4, caching=False)
    running = [harness.add([token] * 4, max_tokens=12)[0] for token in (1, 2)]
    harness.step()
    (late,) = harness.add([3] * 8, max_tokens=4)  # three pages at once; four are free, two of them spoken for
    harness.step()
    assert late.status is Status.WAITING
    assert all(s.status is Status.RUNNING for s in running)
    harness.drain()
    assert harness.scheduler.counters.preemptions == 0


def test_a_finished_block_is_committed_alone_when_there_is_no_page_for_the_next() -> None:
    harness = Harness(BLOCKS, pages=5, page_size=4, caching=False)
    sequences = [harness.add([token] * 4, max_tokens=8)[0] for token in (1, 2)]
    alone = 0
    while harness.scheduler.busy:
        fused = {s.slot for s in sequences if s.slot is not None and (s.clean, s.width) == (4, 8)}
        alone += sum(row.slot in fused and (row.width, row.targets) == (4, 0) for row in harness.step().rows)
    assert alone > 0
    harness.check_empty()


@pytest.mark.parametrize("when", ["queued", "prefilling", "denoising"])
def test_an_abort_frees_the_pages_at_once_and_no_report_brings_it_back(when: str) -> None:
    harness = Harness(BLOCKS, budget=8, max_running=1)
    if when == "queued":
        harness.add([1] * 20, max_tokens=4)
        harness.step()
    (sequence,) = harness.add([2] * 20, max_tokens=20)
    for _ in range({"queued": 1, "prefilling": 1, "denoising": 5}[when]):
        harness.step()
    wanted = {"queued": sequence.status is Status.WAITING, "prefilling": sequence.prefilling, "denoising": True}
    assert wanted[when]
    harness.abort(sequence)
    assert not sequence.pages
    assert sequence.finish is None
    harness.drain()


def test_reports_of_sequences_aborted_while_their_forward_ran_are_dropped() -> None:
    harness = Harness(BLOCKS)
    (gone,), (stays,) = harness.add([1] * 4), harness.add([2] * 4)
    reports = harness.device.execute(harness.scheduler.schedule())
    harness.abort(gone)
    moved = harness.scheduler.update(reports)
    assert [sequence for sequence, _ in moved] == [stays]
    assert gone.tokens == [1] * 4
    harness.streamed[stays] += moved[0][1]
    harness.drain()


# ---------------------------------------------------------------------- counters


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("geometry", [BLOCKS, SHIFTED, CAUSAL])
def test_counters_account_for_every_position_and_token(geometry: Geometry, ahead: bool) -> None:
    harness = Harness(geometry, budget=16, stop_rate=0.05, ahead=ahead)
    for i in range(6):
        harness.add([i] * (5 + 7 * i), max_tokens=10 + i)
    harness.drain_requests()
    counters, ran = harness.scheduler.counters, harness.device.ran
    assert counters.prefill_positions + counters.commit_positions + counters.denoise_positions == ran
    assert counters.committed_tokens == sum(len(tokens) for tokens in harness.streamed.values())
    assert sum(s.positions for s in harness.sequences) == ran
    # A prompt's last token is fed again to begin an answer; its last, ragged block is committed with the answer's part.
    whole = sum((s.prompt_len - geometry.causal) // geometry.block * geometry.block for s in harness.sequences)
    assert whole <= counters.prefill_positions <= sum(s.prompt_len for s in harness.sequences)


def test_the_scheduler_and_the_caches_import_no_torch() -> None:
    code = (
        "import sys, linocut.engine.scheduler, linocut.engine.decoding.parameters, linocut.engine.messages;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
