"""Every Triton kernel compiles for a Hopper GPU without one: the interpreter accepts what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PROGRAM = '''
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Device:
    """Stands for a GPU: says what to compile for, and launches nothing."""

    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return torch.device("cpu")


driver.set_active(Device())
compiled = []


def compile_only(kernel, grid):
    def launch(*arguments, **settings):
        compiled.append(kernel.warmup(*arguments, grid=grid, **settings))
    return launch


JITFunction.__getitem__ = compile_only

from linocut.kernels import overlap_triton

overlap_triton.is_hopper = lambda device: True

from linocut.kernels.attention_cuts import Config, choose_config
from linocut.kernels.attention_triton import plan, triton_attention
from linocut.kernels.filters import filter_cutoff
from linocut.kernels.norm import add_rms_norm, rms_norm, silu_and_mul
from linocut.kernels.philox import gumbel_noise
from linocut.kernels.ragged import ragged_case, sampling_case
from linocut.kernels.rope import HeadNorm, rope_and_cache_write, rope_table
from linocut.kernels.experts import mix_experts
from linocut.kernels.letters_triton import Letters
from linocut.kernels.peer_norm_triton import triton_peer_add_rms_norm
from linocut.kernels.projection import LowRank, project
from linocut.kernels.projection_triton import triton_projection
from linocut.kernels.routing import route
from linocut.kernels.statistics import merge_partials, partial_statistics
from linocut.kernels.filters import Cutoff

bfloat16, float32 = torch.bfloat16, torch.float32
for dtype, group, head_dim, scratch, config in [
    (bfloat16, 7, 128, False, None),
    (bfloat16, 7, 128, True, Config(128, 64, 1, 8, 3)),
    (bfloat16, 3, 64, True, Config(32, 64, 4, 4, 3)),
    (float32, 4, 64, False, Config(16, 32, 2, 4, 2)),
    (bfloat16, 4, 256, True, choose_config(128, 4, 32, 4096, 8, 4, 256, 132)),
    (float32, 4, 256, False, choose_config(128, 4, 32, 4096, 8, 4, 256, 132, 4)),
]:
    shape = {"widths": [1, 8], "contexts": [30, 300], "page_size": 16, "scratch": scratch, "dtype": dtype}
    q, k_cache, v_cache, layout = ragged_case(0, group=group, head_dim=head_dim, **shape)
    plan(layout, q.shape[0], q.shape[1], k_cache)
    triton_attention(q, k_cache, v_cache, layout, 0.1, config)
for dtype in (bfloat16, float32):
    x, weight = torch.zeros(1, 48, dtype=dtype), torch.zeros(48, dtype=dtype)
    rms_norm(x, weight, 1e-6, False, backend="triton")
    rms_norm(torch.zeros(3, 5, 48, dtype=dtype), weight, 1e-6, True, backend="triton")
    add_rms_norm(x, x, weight, 1e-6, False, backend="triton")
    silu_and_mul(x, backend="triton")
    for heads, rotary_dim in ((4, 32), (1, 24)):
        q, k, v = torch.zeros(1, heads + 2, 32, dtype=dtype).split([heads, 1, 1], dim=1)
        table = rope_table(8, 32, 1e4, dtype, "cpu", rotary_dim=rotary_dim)
        cache = torch.zeros(1, 16, 1, 32, dtype=dtype)
        index = torch.zeros(1, dtype=torch.int32)
        for norm in (None, HeadNorm(weight[:32], weight[:32], 1e-6, heads == 1)):
            rope_and_cache_write(q, k, v, table, index, index.long(), cache, cache, norm=norm, backend="triton")
    logits, sampling = sampling_case(0, rows=1, vocab=160, dtype=dtype)
    filter_cutoff(logits, sampling, backend="triton")
    cutoff = Cutoff(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    everything = {"entropy": True, "margin": True, "top_k": 3, "kept_total": True}
    partial_statistics(logits, 0, sampling, cutoff=cutoff, backend="triton", **everything)
    partial_statistics(logits, 1, None, backend="triton")
x, weight, gated = torch.zeros(9, 256, dtype=bfloat16), torch.zeros(228, 256, dtype=bfloat16), torch.ones(9) > 0
for activate in (False, True):
    project(x, weight, weight[0, :228], activate=activate, backend="triton")
    project(x.expand(9, 256).repeat(1, 32), weight.repeat(1, 32), activate=activate, backend="triton")
    low_rank = LowRank(torch.zeros(100, 128, dtype=bfloat16))
    project(x, weight, low_rank=low_rank, gated=gated, activate=activate, backend="triton")
# As served: few rows of a 7B's matrices with an adapter's rows.
for rows in (1, 32):
    for features, inner, activate in (
        (4608, 3584, False), (2304, 3584, False), (3584, 18_944, False), (37_888, 3584, True)
    ):
        weight = torch.zeros(1, 1, dtype=bfloat16).expand(features + 128, inner)
        low_rank = LowRank(torch.zeros(1, 1, dtype=bfloat16).expand(features, 128))
        x, gated = torch.zeros(rows, inner, dtype=bfloat16), torch.ones(rows) > 0
        project(x, weight, low_rank=low_rank, gated=gated, activate=activate, backend="triton")
        project(x, weight[:features], activate=activate, backend="triton")
x, weights = torch.zeros(9, 64, dtype=bfloat16), torch.zeros(9, 2)
experts, ups, downs = torch.zeros(9, 2, dtype=torch.int64), torch.zeros(4, 128, 64), torch.zeros(4, 64, 64)
mix_experts(x, ups.bfloat16(), downs.bfloat16(), experts, weights, backend="triton")
for score in ("softmax", "sigmoid"):
    route(torch.zeros(9, 32), torch.zeros(32), active=4, score=score, groups=4, active_groups=2, backend="triton")
everything = {"entropy": True, "margin": True, "kept_total": True}
partials = partial_statistics(logits, 0, sampling, cutoff=cutoff, backend="triton", **everything)
merge_partials(partials, sampling, filtered_confidence=torch.zeros(1, dtype=torch.bool), backend="triton")
gumbel_noise(sampling.seed, sampling.choice, sampling.position, sampling.step, 1, 50, backend="triton")
for dtype, ranks, rank in ((bfloat16, 2, 1), (float32, 4, 0)):
    letters = Letters(torch.zeros(ranks, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), rank, ranks, 4, 8192)
    x = torch.zeros(3, 3584, dtype=dtype)
    triton_peer_add_rms_norm(x, x, x[0], 1e-6, False, letters)
    if dtype == bfloat16:  # halves of a 7B's matrices
        for rows, features, inner in ((1, 3584, 1792), (3, 3584, 9472)):
            weight = torch.zeros(1, 1, dtype=dtype).expand(features, inner)
            triton_projection(torch.zeros(rows, inner, dtype=dtype), weight, None, letters=letters)
        triton_peer_add_rms_norm(x, x, x[0], 1e-6, False, letters, sent=True)
for kernel in compiled:
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= 232_448, "what a program has on a Hopper GPU"
assert any(kernel.metadata.launch_pdl for kernel in compiled)
print(len(compiled))
'''


def test_every_kernel_compiles_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) >= 62
