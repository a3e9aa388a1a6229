"""A function in a Ray actor, seen as a process: it ends, and its end is noticed, as a process of this machine."""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.util.placement_group import PlacementGroup

from linocut.engine.parallel.actor import ActorProcess
from linocut.engine.parallel.placed import interface_of

# Not an expectation, only an end to waiting for what never comes.
PATIENCE = 60.0


@pytest.fixture(scope="module")
def place(ray_files: None) -> Iterator[PlacementGroup]:
    """Room for one actor."""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray.util.placement_group([{"CPU": 1}])
    ray.shutdown()


def readable(process: ActorProcess, seconds: float = 0.0) -> bool:
    return bool(select.select([process.sentinel], [], [], seconds)[0])


def test_a_function_that_returns(place: PlacementGroup, caplog: pytest.LogCaptureFixture) -> None:
    process = ActorProcess("sleeper", place, 0, time.sleep, 1.0)
    assert process.is_alive()
    assert not readable(process)
    assert readable(process, PATIENCE)
    process.join()
    assert (process.is_alive(), process.exitcode, process.pid) == (False, 0, None)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [(os._exit, 3, "the one"), (sys.exit, 3, "exit code 3"), (int, "x", "invalid literal for int")],
)
def test_one_that_does_not(
    place: PlacementGroup,
    caplog: pytest.LogCaptureFixture,
    function: Callable[[object], object],
    argument: object,
    reason: str,
) -> None:
    process = ActorProcess("the one", place, 0, function, argument)
    assert readable(process, PATIENCE)
    process.join()
    assert (process.is_alive(), process.exitcode) == (False, None)
    assert "the one has ended: " in caplog.text
    assert reason in caplog.text


def test_one_that_is_killed_while_it_runs_or_waits_makes_room(
    place: PlacementGroup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runs, waits = ActorProcess("runs", place, 0, time.sleep, 100), ActorProcess("waits", place, 0, time.sleep, 0)
    waits.join(1.0)
    assert waits.is_alive(), "there is no room for it"
    never = ActorProcess("never", place, 0, time.sleep, 0)
    for process in (never, runs):
        process.kill()
        assert readable(process, PATIENCE)
        process.join()
        assert process.exitcode is None
    assert readable(waits, PATIENCE)
    waits.join()
    assert waits.exitcode == 0
    assert caplog.text == "", "nobody needs to hear of it"


def test_an_address_has_an_interface() -> None:
    assert interface_of("127.0.0.1") in ("lo", "lo0", None if sys.platform != "linux" else "lo")
    assert interface_of("203.0.113.7") is None
