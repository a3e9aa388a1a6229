"""Every kernel of a forward against its floor on this machine's GPU.

    python -m linocut.kernels.floors [--out FILE.json] [--quick] [--page docs/kernels.md]
    python -m linocut.kernels.floors --render FILE.json [--page docs/kernels.md]     of an earlier run

A kernel's floor is the longest of three times: the bytes that it has to move over the bandwidth measured here, its
operations over the matrix rate measured here, and that of an empty kernel. Needs torch and triton, and a CUDA GPU for
everything but --render; exits with status 2 where there is none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .attention_flash import FlashAttention, FlashUnavailableError, find_flash
from .backend import default_backend
from .floor_cases import MODELS, Case, ModelShape, Setting, all_cases
from .floor_table import Ceilings, Line, into_page, render
from .graph_clock import graph_time


def measure_ceilings(device: torch.device) -> Ceilings:
    """Bandwidth of a large copy and a large read, rate of a large product of random data, time of an empty kernel."""
    size = 2 << 30
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device).random_().unbind()
    wide = source.view(torch.int64)
    # By a kernel: what `copy_` takes for large blocks is slower here.
    copy = 2 * size / graph_time([partial(torch.bitwise_not, wide, out=target.view(torch.int64))] * 3)
    read = size / graph_time([wide.amax] * 3)
    del source, target, wide
    a, b = torch.randn(2, 8192, 8192, device=device).bfloat16().unbind()
    rate = 2 * 8192.0**3 / graph_time([partial(torch.mm, a, b)] * 3)
    nothing = torch.zeros(1, device=device)
    empty = graph_time([partial(nothing.add_, 1)] * 48)
    return Ceilings(copy, read, rate, empty)


def measure(case: Case, ceilings: Ceilings) -> Line:
    seconds = graph_time(case.calls)
    return Line(case.kernel, case.shape, ceilings.floor(case.moved, case.flops), seconds, case.moved, case.flops)


def run(quick: bool, models: Sequence[ModelShape] = MODELS) -> tuple[Ceilings, list[Line]]:
    """Measure everything; prints a line as each kernel is done."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    ceilings = measure_ceilings(device)
    print(ceilings.sentence(), flush=True)
    lines: list[Line] = []
    try:
        flash = FlashAttention(find_flash(device), everything=True)
    except FlashUnavailableError:
        flash = None
    for case in all_cases(Setting(device, default_backend(device), quick, flash=flash), models):
        line = measure(case, ceilings)
        lines.append(line)
        print(f"{line.kernel:<27}{line.shape:<44}{line.seconds * 1e6:>10.1f} us {line.ratio:>6.2f} x", flush=True)
    return ceilings, lines


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m linocut.kernels.floors", description=about)
    parser.add_argument("--out", metavar="FILE", help="write ceilings and times to FILE, as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--render", metavar="FILE", help="print the Markdown of an earlier run's JSON, measure nothing")
    parser.add_argument("--page", metavar="FILE", help="put the Markdown into its place in FILE, too")
    options = parser.parse_args(arguments)
    if options.render:
        saved = json.loads(Path(options.render).read_text())
        table = render(Ceilings(**saved["ceilings"]), [Line(**line) for line in saved["lines"]], saved["device"])
        return _publish(table, options.page)
    if not torch.cuda.is_available():
        print("linocut.kernels.floors needs a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    began = time.perf_counter()
    ceilings, lines = run(options.quick)
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    if options.out:
        report: dict[str, Any] = {"device": device, "seconds": time.perf_counter() - began, "ceilings": vars(ceilings)}
        report["lines"] = [vars(line) for line in lines]
        Path(options.out).write_text(json.dumps(report, indent=1))
    print()
    return _publish(render(ceilings, lines, device), options.page)


def _publish(table: str, page: str | None) -> int:
    print(table)
    if page is not None:
        Path(page).write_text(into_page(Path(page).read_text(), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
