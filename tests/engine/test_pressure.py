"""Forwards that run out of memory: undone, tried again smaller, and never anybody's wrong text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from request_mix import mixed_requests
from tiny_engines import FAMILIES, assert_empty, engine, prompt_of, request, run

from linocut.engine.core import EngineCore
from linocut.engine.machine import is_out_of_memory
from linocut.engine.pressure import PROBATION, MemoryPressure

Fails = Callable[[int, int], bool]  # (call, positions) -> whether it runs out of memory


def starve(core: EngineCore, part: str, fails: Fails) -> None:
    """Let the calls of `decoder.forward` or `decoder.logits` fail for which `fails` says so, after their work."""
    whole = getattr(core.runner.decoder, part)
    calls = 0

    def starved(first: torch.Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        result = whole(first, *rest)
        if fails(calls, first.shape[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return result

    setattr(core.runner.decoder, part, starved)


# Planned ahead, a forward fails while another one is under way.
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])


@AHEAD
@pytest.mark.parametrize("part", ["forward", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_a_device_with_memory(family: str, part: str, ahead: bool) -> None:
    whole, starved = engine(family), engine(family)
    starved.overlapping = ahead
    starve(starved, part, lambda call, _: call % 9 == 5)
    expected = run(whole, mixed_requests(whole, family), gap=2)
    found = run(starved, mixed_requests(starved, family), gap=2)
    assert {key: answer.text for key, answer in found.items()} == {key: a.text for key, a in expected.items()}
    assert starved.stats().out_of_memory > 3


@AHEAD
def test_forwards_shrink_until_they_fit(ahead: bool) -> None:
    core = engine("sdar", max_running=8)
    core.overlapping = ahead
    starve(core, "forward", lambda _, positions: positions > 100)
    requests = [request(core, str(i), prompt_of(100, seed=i), 12, ignore_eos=True) for i in range(8)]
    answers = run(core, requests)
    assert all(len(answer.tokens) == 12 for answer in answers.values())
    assert core.scheduler.token_budget <= 100
    assert core.stats().out_of_memory < 8, "the bound is found once, not again and again"


@AHEAD
def test_a_row_that_does_not_fit_alone_ends_by_an_error_and_the_others_go_on(ahead: bool) -> None:
    """Longer contexts than the others', in a world where memory is what a context takes."""
    core = engine("sdar")
    core.overlapping = ahead

    def long_context(*_: int) -> bool:
        return any(len(sequence.tokens) >= 100 for sequence in core.scheduler._under_way[-1])

    starve(core, "forward", long_context)

    for name, length in (("a", 20), ("long", 100), ("b", 20)):
        core.add(request(core, name, prompt_of(length), 40, ignore_eos=True))
    ended = {}
    for _ in range(500):
        if not core.busy:
            break
        ended |= {output.request_id: output for output in core.step() if output.finish_reason}
    assert {name: output.finish_reason for name, output in ended.items()} == {
        "a": "length", "long": "error", "b": "length"
    }  # fmt: skip
    assert ended["long"].error == "out of memory"
    assert_empty(core)


@AHEAD
def test_a_device_without_any_memory_fails_every_request(ahead: bool) -> None:
    core = engine("sdar")
    core.overlapping = ahead
    starve(core, "forward", lambda *_: True)
    for number in range(5):
        core.add(request(core, str(number), prompt_of(20), 8, n=2))
    outputs = []
    for _ in range(200):
        if core.busy:
            outputs += core.step()
    assert_empty(core)
    assert [output.finish_reason for output in outputs] == ["error"] * 10


def test_what_is_no_shortage_of_memory_is_raised() -> None:
    core = engine("sdar")

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    core.runner.decoder.forward = broken
    core.add(request(core, "a", prompt_of(20), 8))
    with pytest.raises(RuntimeError, match="illegal"):
        core.step()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_a_shortage_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_this_machines_own_error_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_bound_falls_and_rises_after_a_probation() -> None:
    pressure = MemoryPressure(512, 20)
    assert pressure.fail(400)
    assert pressure.budget == 200
    assert pressure.fail(60)
    assert pressure.budget == 30
    assert [pressure.succeed() for _ in range(PROBATION)].index(True) == PROBATION - 1
    assert pressure.budget == 60
    for _ in range(5 * PROBATION):
        pressure.succeed()
    assert pressure.budget == 512
    assert pressure.failures == 2


@pytest.mark.parametrize("size", [8, 100])
def test_the_least_there_is_gets_a_second_try(size: int) -> None:
    pressure = MemoryPressure(512, 20)
    while pressure.budget > max(size // 2, 20):
        assert pressure.fail(size)
    pressure.succeed()
    assert pressure.fail(size)
    assert not pressure.fail(size)
    assert pressure.budget == 512, "whether other rows fit is another question"


def test_a_row_whose_forwards_fail_twice_in_one_step_ends_once() -> None:
    """The one planned ahead, and the one planned again behind the results that were under way."""
    core = engine("sdar")
    core.overlapping = True
    starve(core, "forward", lambda call, _: call in (4, 5))
    # `run` sees to it that every choice ends once, and that all it has committed was told.
    (answer,) = run(core, [request(core, "a", prompt_of(8), 32, {"strategy": "static", "denoising_steps": 4})]).values()
    assert answer.finish == "error"
    assert answer.tokens
