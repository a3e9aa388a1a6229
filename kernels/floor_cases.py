"""What serving asks of each kernel: the shapes, the fewest bytes and operations, and calls that run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionLayout, staircase_attention
from .attention_flash import FlashAttention
from .backend import Backend
from .experts import mix_experts
from .norm import add_rms_norm, silu_and_mul
from .projection import is_faster, project
from .ragged import sampling_case
from .rope import rope_and_cache_write, rope_table
from .statistics import vocab_statistics

PAGE = 16
# Sets of inputs that a case rotates through hold this much together: several times an H100's L2 cache.
COLD = 200 << 20
MOST_CALLS = 48


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. biased: q, k and v have one."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    biased: bool

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SEVEN = ModelShape("7B", 3584, 28, 4, 128, 18_944, 152_064, True)
SMALL = ModelShape("135M", 576, 9, 3, 64, 1536, 49_152, False)
MODELS = (SEVEN, SMALL)


@dataclass(frozen=True)
class MixtureShape:
    """A layer of experts: count of them, active ones of a token."""

    name: str
    hidden: int
    intermediate: int
    count: int
    active: int


MIXTURES = (
    MixtureShape("LLaDA2-mini", 2048, 512, 256, 8),
    MixtureShape("SDAR-30B-A3B", 2048, 768, 128, 8),
)


@dataclass(frozen=True)
class Case:
    """moved: bytes read and written at least. flops: of the matrix unit. calls: each reads inputs of its own."""

    kernel: str
    shape: str
    moved: int
    flops: float
    calls: Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Setting:
    """Where cases are made. quick: fewer of them."""

    device: torch.device
    backend: Backend
    quick: bool = False
    dtype: torch.dtype = torch.bfloat16
    flash: FlashAttention | None = None

    @cached_property
    def processors(self) -> int:
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes to rotate through."""
        return max(2, min(MOST_CALLS, COLD // max(size, 1) + 1)) if self.device.type == "cuda" else 1


def all_cases(
    setting: Setting, models: Sequence[ModelShape] = MODELS, mixtures: Sequence[MixtureShape] = MIXTURES
) -> Iterator[Case]:
    for mixture in mixtures:
        yield from expert_cases(setting, mixture)
    for shape in models:
        yield from attention_cases(setting, shape)
        yield from small_cases(setting, shape)
        yield from projection_cases(setting, shape)
        yield from head_cases(setting, shape)


def attention_cases(setting: Setting, model: ModelShape) -> Iterator[Case]:
    """Denoising of blocks, autoregressive rows, prefill."""
    contexts = (1024, 8192) if model is SEVEN else (1024,)
    shapes = [(rows, width, context, False) for context in contexts for width in (32, 4) for rows in (1, 8, 64)]
    shapes += [(rows, 1, context, True) for context in contexts for rows in (1, 64)]
    shapes += [(1, 512, 512, True), (64, 512, 512, True), (1, 2048, 8192, True)]
    if setting.quick:
        shapes = [(1, 32, 1024, False), (8, 32, 1024, False), (64, 32, 8192, False), (1, 512, 512, True)]
    for rows, width, context, causal in shapes:
        kind = "causal" if causal else "block"
        label = f"{rows} x {width} rows, context {context}, {kind}"
        label = f"{model.name}, {label}"
        keys = 4 * rows * context * model.kv_heads * model.head_dim
        seen = rows * (width * context - (width * (width - 1) // 2 if causal else 0))
        flops = 4.0 * seen * model.heads * model.head_dim
        moved = keys + 4 * rows * width * model.heads * model.head_dim
        calls = attention_calls(setting, model, rows, width, context, causal)
        yield Case("staircase attention", label, moved, flops, calls)
        if setting.flash is not None:
            calls = attention_calls(setting, model, rows, width, context, causal, setting.flash)
            yield Case("the same by FlashAttention", label, moved, flops, calls)


def attention_calls(
    setting: Setting,
    model: ModelShape,
    rows: int,
    width: int,
    context: int,
    causal: bool,
    flash: FlashAttention | None = None,
) -> list[partial[Tensor]]:
    """rows sequences of `width` queries at the end of `context` slots in shuffled pages, a cache for each call."""
    device, pages = setting.device, -(-context // PAGE)
    table = torch.randperm(rows * pages, device=device).int().view(rows, pages)
    visible = torch.full((rows, width), context, dtype=torch.int32, device=device)
    if causal:
        visible = visible - torch.arange(width - 1, -1, -1, dtype=torch.int32, device=device)
    starts = torch.arange(rows + 1, device=device).int() * width
    layout = AttentionLayout(
        starts, table, visible.flatten(), None, None, width, context, pattern="causal" if causal else "block"
    )
    q = setting.normal(rows * width, model.heads, model.head_dim)
    keys = 2 * rows * context * model.kv_heads * model.head_dim * 2
    caches = [setting.normal(2, rows * pages, PAGE, model.kv_heads, model.head_dim) for _ in range(setting.sets(keys))]
    scale = model.head_dim**-0.5
    return [
        partial(staircase_attention, q, cache[0], cache[1], layout, scale, backend=setting.backend, flash=flash)
        for cache in caches
    ]


def small_cases(setting: Setting, model: ModelShape) -> Iterator[Case]:
    """What lies between the products: all of it bound by memory, or by being a kernel at all."""
    for rows in (32, 2048) if setting.quick else (1, 32, 256, 2048):
        label = f"{model.name}, {rows} rows"
        weight = setting.normal(model.hidden)
        moved = 8 * rows * model.hidden
        pairs = [setting.normal(2, rows, model.hidden) for _ in range(setting.sets(moved))]
        calls: list[Callable[[], object]]
        calls = [
            partial(add_rms_norm, pair[0], pair[1], weight, 1e-6, False, backend=setting.backend) for pair in pairs
        ]
        yield Case("residual + norm", label, moved, 0.0, calls)
        moved = 6 * rows * model.intermediate
        gates = [setting.normal(rows, 2 * model.intermediate) for _ in range(setting.sets(moved))]
        calls = [partial(silu_and_mul, gate, backend=setting.backend) for gate in gates]
        yield Case("gated activation", label, moved, 0.0, calls)
        yield _rope_case(setting, model, rows, label)


def _rope_case(setting: Setting, model: ModelShape, rows: int, label: str) -> Case:
    device, moved = setting.device, 4 * rows * model.qkv
    sizes = [model.heads, model.kv_heads, model.kv_heads]
    table = rope_table(8192, model.head_dim, 1e6, setting.dtype, device)
    index = torch.randperm(8192, device=device)[:rows].int()
    cache = setting.normal(2, 8192 // PAGE, PAGE, model.kv_heads, model.head_dim)
    fused = [setting.normal(rows, sum(sizes), model.head_dim) for _ in range(setting.sets(moved))]

    def rope(one: Tensor) -> object:
        q, k, v = one.split(sizes, dim=1)
        return rope_and_cache_write(q, k, v, table, index, index, cache[0], cache[1], backend=setting.backend)

    calls = [partial(rope, one) for one in fused]
    return Case("rope + cache write", label, moved, 0.0, calls)


def _product(setting: Setting, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As linear layers choose it."""
    ours = setting.backend == "triton" and is_faster(x.shape[0], weight, setting.processors)
    return project(x, weight, bias, backend="triton" if ours else "torch")


def projection_cases(setting: Setting, model: ModelShape) -> Iterator[Case]:
    """The four products of a layer."""
    matrices = {
        "qkv": (model.qkv, model.hidden),
        "o": (model.hidden, model.heads * model.head_dim),
        "gate and up": (2 * model.intermediate, model.hidden),
        "down": (model.hidden, model.intermediate),
    }
    for name, (features, inner) in matrices.items():
        size = 2 * features * inner
        weights = [setting.normal(features, inner) * inner**-0.5 for _ in range(setting.sets(size))]
        bias = setting.normal(features) if model.biased and name == "qkv" else None
        for rows in (32, 256) if setting.quick else (1, 8, 32, 64, 128, 256, 512):
            x = setting.normal(rows, inner)
            calls = [partial(_product, setting, x, weight, bias) for weight in weights]
            moved = size + 2 * rows * (features + inner)
            yield Case(f"{name} product", f"{model.name}, {rows} rows", moved, 2.0 * rows * features * inner, calls)


def expert_cases(setting: Setting, mixture: MixtureShape) -> Iterator[Case]:
    """Experts of a layer, each token sent to random ones: what is read are those that some token goes to."""
    m = mixture
    size = 6 * m.count * m.hidden * m.intermediate
    sets = setting.sets(size)
    ups = setting.normal(sets, m.count, 2 * m.intermediate, m.hidden) * m.hidden**-0.5
    downs = setting.normal(sets, m.count, m.hidden, m.intermediate) * m.intermediate**-0.5
    for rows in (32, 256) if setting.quick else (1, 8, 32, 256, 2048):
        x = setting.normal(rows, m.hidden)
        experts = torch.rand(rows, m.count, device=setting.device).topk(m.active, dim=1).indices
        weights = torch.rand(rows, m.active, device=setting.device)
        calls = [
            partial(mix_experts, x, up, down, experts, weights, backend=setting.backend)
            for up, down in zip(ups, downs, strict=True)
        ]
        # A row's activations, in and out of either product, and its share of the sum.
        passed = rows * m.active * (3 * m.hidden + 2 * m.intermediate) * 2
        moved = size // m.count * int(experts.unique().numel()) + passed
        flops = 6.0 * rows * m.active * m.hidden * m.intermediate
        yield Case("experts", f"{m.name}, {rows} rows", moved, flops, calls)


def head_cases(setting: Setting, model: ModelShape) -> Iterator[Case]:
    """The vocabulary's product, which leaves logits in half precision, and their reduction to statistics."""
    weights = [setting.normal(model.vocab, model.hidden) * model.hidden**-0.5]
    asked: dict[str, Any] = {"entropy": True, "margin": True, "backend": setting.backend}
    for rows in (32,) if setting.quick else (1, 32, 256):
        x = setting.normal(rows, model.hidden)
        size, flops = 2 * model.vocab * model.hidden, 2.0 * rows * model.vocab * model.hidden

        def reduce(weight: Tensor, x: Tensor = x) -> object:
            return vocab_statistics(_product(setting, x, weight, None), None, **asked)

        calls: list[Callable[[], object]] = [partial(reduce, weight) for weight in weights * 2]
        yield Case("head + statistics", f"{model.name}, {rows} rows", size, flops, calls)
        logits, sampling = sampling_case(0, rows=rows, vocab=model.vocab, dtype=setting.dtype, device=setting.device)
        plain = replace(sampling, filtered=False)
        moved = 2 * logits.numel()
        copies = [logits.clone() for _ in range(setting.sets(moved))]
        calls = [partial(vocab_statistics, copy, plain, **asked) for copy in copies]
        yield Case("statistics, sampled", f"{model.name}, {rows} rows", moved, 0.0, calls)
