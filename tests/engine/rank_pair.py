"""Two processes that hold tiny models together, and what tests have them do; also done by one process alone."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from test_strategies import LIVELY
from tiny_engines import engine, prompt_of, request, run

from linocut.engine.conformance.fixture import Result
from linocut.engine.conformance.run import run_fixture
from linocut.engine.messages import AddRequest
from linocut.engine.parallel.crew import join
from linocut.engine.parallel.ranks import Ranks

# Not an expectation, only an end to waiting for what never comes.
PATIENCE = 200.0
SIZE = 2
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.05, "min_tokens": 6, "stop_token_ids": tuple(range(100, 160))},
]
Texts = dict[str, tuple[list[int], str | None]]


class RankPair:
    """Both ranks call the function that they are given, with the group's `Ranks` in front of its arguments."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(SIZE):
            mine, other = context.Pipe()
            process = context.Process(target=_member, args=(rank, folder / "meeting", other), daemon=True)
            process.start()
            other.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What rank 0 returns, which is what the other one returns."""
        for pipe in self._pipes:
            pipe.send((function, args))
        found: dict[int, Any] = {}
        while len(found) < SIZE:
            ready = wait([self._pipes[rank] for rank in range(SIZE) if rank not in found], PATIENCE)
            if not ready:
                self.close()
                raise TimeoutError("a rank does not answer")
            for rank in range(SIZE):
                if self._pipes[rank] in ready:
                    value, error = self._pipes[rank].recv()
                    if error:
                        # The other one may wait for it for ever.
                        self.close()
                        raise AssertionError(f"rank {rank}: {error}")
                    found[rank] = value
        assert found[0] == found[1], "the ranks disagree"
        return found[0]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _member(rank: int, meeting: Path, pipe: Connection) -> None:
    ranks = join(rank, SIZE, meeting, torch.device("cpu"))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(ranks, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def texts(
    ranks: Ranks,
    family: str,
    extra: dict[str, list[dict[str, Any]]],
    overrides: dict[str, Any],
    joint_rows: int | None = None,
) -> Texts:
    """Every strategy of a model, each with every way to sample, in one batch. extra: more settings of a strategy.
    joint_rows: of the runner."""
    core = engine(family, ranks=ranks, **overrides)
    if joint_rows is not None:
        core.runner.joint_rows = joint_rows
    requests: list[AddRequest] = []
    for strategy in core.info.strategies:
        for values in (LIVELY | extra).get(strategy, [{}]):
            sampling = {"seed": len(requests), **SAMPLING[len(requests) % len(SAMPLING)]}
            prompt = prompt_of(3 + 5 * (len(requests) % 7), seed=len(requests))
            requests.append(request(core, str(len(requests)), prompt, 13, {"strategy": strategy, **values}, **sampling))
    return {name: answer.text[:2] for (name, _), answer in run(core, requests).items()}


def golden_results(ranks: Ranks, folder: Path) -> list[Result] | None:
    return run_fixture(folder, "cpu", ranks)


def some_cases(source: Path, target: Path, keep: dict[str, int]) -> Path:
    """A golden folder with no more than every n-th case of a kind: keep[kind] is n."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "golden.json":
            (target / path.name).symlink_to(path)
    meta = json.loads((source / "golden.json").read_text())
    for kind, nth in keep.items():
        if kind in meta:
            meta[kind] = meta[kind][::nth]
    (target / "golden.json").write_text(json.dumps(meta))
    return target
