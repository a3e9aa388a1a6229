"""`linocut conformance FOLDER`: every case of a golden folder, a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ..config import EngineConfig
from ..machine import choose_device
from ..parallel.crew import Crew
from ..parallel.ranks import ALONE, Ranks
from .canvas import run_canvas
from .decode import run_fast_dllm_v2, run_sdar
from .filters import run_filters
from .fixture import Fixture, Result
from .forward import run_forward_cases
from .freedave import run_freedave
from .jacobi import run_jacobi
from .learn2pd import run_learn2pd
from .llada2 import run_dinfer, run_llada2
from .rules import run_rules
from .wedlm import run_wedlm

# What replays the decoding cases of a family.
DECODERS: dict[str, Callable[[Fixture], list[Result]]] = {
    "fast_dllm_v2": run_fast_dllm_v2,
    "sdar": run_sdar,
    "sdar_moe": run_sdar,
    "jacobi_qwen2": run_jacobi,
    "llada": run_canvas,
    "dream": run_canvas,
    "sched": run_canvas,
    "commit_rules": run_rules,
    "llada2": run_llada2,
    "llada21": run_llada2,
    "dinfer": run_dinfer,
    "learn2pd": run_learn2pd,
    "freedave": run_freedave,
    "sampling_filters": run_filters,
    "wedlm": run_wedlm,
    "wedlm_bias": run_wedlm,
}


def run_fixture(folder: Path, device: str = "cpu", ranks: Ranks = ALONE) -> list[Result] | None:
    """Results of all cases on `device`, or None if the folder's family is not built yet.

    ranks: all of them run the fixture at the same time, and have the same results. Raises ModelError for a broken
    folder.
    """
    fixture = Fixture(folder, device, ranks=ranks)
    if fixture.family not in DECODERS:
        return None
    return run_forward_cases(fixture) + DECODERS[fixture.family](fixture)


def conformance(folder: Path, device: str = "cpu", size: int = 1) -> int:
    """Print the results; returns the exit status: 0 all passed, 1 a case failed, 2 the family is not built yet.

    size: processes that hold the model together.
    """
    results = run_fixture(folder, device) if size == 1 else _run_parallel(folder, device, size)
    if results is None:
        fixture = Fixture(folder)
        print(f"{fixture.family}: not built yet, {fixture.case_count} cases were not run")
        return 2
    for result in results:
        print(f"{result.outcome:16s} {result.case}" + (f"  ({result.detail})" if result.detail else ""))
    count = Counter(result.outcome for result in results)
    known = count["known difference"]
    print(f"{count['pass']} passed, {count['fail']} failed" + (f", {known} known differences" if known else ""))
    return 1 if count["fail"] else 0


def _run_parallel(folder: Path, device: str, size: int) -> list[Result] | None:
    config = EngineConfig(model=str(folder), device=device, tensor_parallel_size=size)
    crew = Crew(size)
    try:
        crew.start(choose_device(config, crew.devices), _follow, folder, device)
        return run_fixture(folder, device, crew.ranks)
    finally:
        crew.close()


def _follow(ranks: Ranks, folder: Path, device: str) -> None:
    run_fixture(folder, device, ranks)
