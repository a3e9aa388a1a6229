"""Try cuts of the Triton attention at the shapes that serving meets: what `attention_cuts.choose_config` is made of.

    python -m linocut.kernels.tune_attention [--out FILE.json]

Needs torch, triton and a CUDA GPU; takes a few minutes, most of them for compiling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .attention_cuts import Config, choose_config
from .attention_triton import triton_attention
from .floor_cases import SEVEN, SMALL, ModelShape, Setting, attention_calls
from .graph_clock import graph_time

# Model, sequences, queries of each, context, causal.
SHAPES = [
    *[(SEVEN, rows, width, context, False) for context in (1024, 8192) for width in (32, 8, 4) for rows in (1, 8, 64)],
    *[(SEVEN, rows, 1, context, True) for context in (1024, 8192) for rows in (1, 64)],
    *[(SEVEN, rows, width, width, True) for rows, width in ((1, 512), (64, 512), (1, 8192))],
    *[(SMALL, rows, width, 1024, False) for rows, width in ((1, 32), (64, 8), (64, 32))],
    (SMALL, 64, 512, 512, True),
]


def cuts(group: int, width: int, context: int, prefill: bool) -> Iterator[Config]:
    """All that could make sense for rows of `width` queries."""
    splits = (1,) if prefill else (1, 2, 4, 8, 16, 32)
    for m, n, share, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), splits, (2, 3, 4)):
        if m >= group and (m == 16 or m < 4 * width * group) and n <= context and context // share >= 64:
            for warps in (4, 8) if m >= 64 else (4,):
                yield Config(m, n, share, warps, stages)


def attend(inputs: tuple[Any, ...], config: Config) -> torch.Tensor:
    q, k_cache, v_cache, layout, scale = inputs
    return triton_attention(q, k_cache, v_cache, layout, scale, config)


def tune(model: ModelShape, rows: int, width: int, context: int, causal: bool) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    group = model.heads // model.kv_heads
    chosen = choose_config(rows * width, rows, width, context, model.kv_heads, group, model.head_dim, processors)
    inputs = [call.args[:5] for call in attention_calls(Setting(device, "triton"), model, rows, width, context, causal)]
    found: list[tuple[float, str]] = []
    for config in {chosen, *cuts(group, width, context, causal and width > 1)}:
        try:
            seconds = graph_time([partial(attend, one, config) for one in inputs], 3)
            found.append((seconds * 1e6, str(config)))
        except Exception as error:  # a cut that needs more shared memory than there is
            if "out of resource" not in str(error).lower():
                raise
    found.sort()
    now = next(time for time, config in found if config == str(chosen))
    name = f"{model.name}, {rows} x {width}, context {context}"
    print(f"{name}: chosen {now:.1f} us {chosen}", *(f"  {time:.1f} {config}" for time, config in found[:5]), sep="\n")
    return {"shape": name, "chosen": str(chosen), "us": now, "found": found[:20]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m linocut.kernels.tune_attention")
    parser.add_argument("--out", metavar="FILE", help="write the fastest cuts to FILE, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("linocut.kernels.tune_attention needs a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    lines = []
    for shape in SHAPES:
        lines.append(tune(*shape))
        if options.out:
            Path(options.out).write_text(json.dumps(lines, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
