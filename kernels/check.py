"""Check every Triton kernel on this machine's device against float64 or torch. `kernels.floors` times them.

    python -m linocut.kernels.check [--device cuda] [--json FILE]     on a GPU
    python -m linocut.kernels.check --quick                           a rehearsal in the interpreter

Needs torch, triton and numpy. Exits with status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator

import torch

from .backend import default_backend
from .check_cases import (
    Outcome,
    attention_checks,
    capture_checks,
    expert_checks,
    flash_checks,
    product_checks,
    routing_checks,
    small_checks,
    statistics_checks,
)
from .interpreter import use_interpreter


def self_test(device: str) -> list[Outcome]:
    """The kernels that serve on `device`, at small shapes, against float64."""
    torch.manual_seed(0)
    backend = default_backend(torch.device(device))
    outcomes = [*attention_checks(device, True, backend), *statistics_checks(device, True, backend)]
    if backend == "triton":
        outcomes += [*small_checks(device, True), *expert_checks(device, True)]
        outcomes += [*routing_checks(device), *product_checks(device, True)]
    return outcomes


def run_checks(device: str, quick: bool) -> list[Outcome]:
    """Run everything; print failures as they come, and a line for each kind of check when its family is done."""
    outcomes: list[Outcome] = []
    families: list[Callable[[], Iterator[Outcome]]] = [
        lambda: product_checks(device, quick),
        lambda: small_checks(device, quick),
        lambda: routing_checks(device),
        lambda: expert_checks(device, quick),
        lambda: statistics_checks(device, quick),
        lambda: attention_checks(device, quick),
    ]
    if device.startswith("cuda"):
        families += [lambda: capture_checks(device), lambda: flash_checks(device)]
    for family in families:
        worst: dict[str, tuple[int, float]] = {}
        for outcome in family():
            outcomes.append(outcome)
            if not outcome.passed:
                print(f"FAILED  {outcome.name}: {outcome.error:.3g} > {outcome.limit:.3g}", flush=True)
            key = outcome.name.split(",")[0]
            count, error = worst.get(key, (0, 0.0))
            worst[key] = (count + 1, max(error, outcome.error))
        for key, (count, error) in worst.items():
            print(f"{key:<28}{count:>4} checks, largest difference {error:.2g}", flush=True)
    print(f"{sum(outcome.passed for outcome in outcomes)} of {len(outcomes)} checks passed", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m linocut.kernels.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="the device to check (default: cuda)")
    parser.add_argument("--json", metavar="FILE", help="write the checks to FILE")
    parser.add_argument("--quick", action="store_true", help="small shapes on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.quick:
        use_interpreter()
        arguments.device = "cpu"
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here; --quick rehearses on the CPU")
    outcomes = run_checks(arguments.device, arguments.quick)
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name() if not arguments.quick else "interpreter",
            "torch": torch.__version__,
            "checks": [vars(outcome) | {"passed": outcome.passed} for outcome in outcomes],
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
