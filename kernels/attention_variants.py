"""The variants of the Triton attention that batches may ask for, compiled before a request has to wait for one.

A kernel is compiled anew for each way in which it is cut. Steps at the start are of short texts, so that the first long
context, or the first full batch, would stop everybody for a second or two.
"""

from __future__ import annotations

import logging
from itertools import product

import torch
from torch import Tensor

from .attention import AttentionLayout
from .attention_cuts import Config, choose_config

# Bounds of small steps' contexts are this times a power of four, and of their widths a power of four (`lay_out`).
_LEAST_BOUND = 512

log = logging.getLogger("linocut.kernels")

# What makes a kernel another one: how it is cut, whether it has splits and many of them, whether it is of few tokens.
Variant = tuple[int, int, int, int, int, bool]


def variant_of(config: Config, tokens: int, few: int) -> Variant:
    """few: tokens up to which a launch overlaps."""
    splits = (config.splits > 1) + (config.splits > 8)
    cut = config.block_m, config.block_n, config.num_warps, config.num_stages
    return (*cut, splits, tokens <= few)


def variants(
    rows: int,
    tokens: int,
    visible: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    processors: int,
    itemsize: int,
    few: int,
) -> dict[Variant, Config]:
    """A configuration of each variant that up to so many rows and tokens with so long contexts ask for.

    few: as of `variant_of`. Found by asking for sizes of all kinds: rows of one width, and rows of a few positions
    beside one that is longer.
    """
    found: dict[Variant, Config] = {}
    for count, width, seen in product({*_powers(rows), _above(rows)}, _widths(tokens), _contexts(visible)):
        for beside in {0, 1, 4, width}:
            total = min(width + (count - 1) * beside, tokens)
            config = choose_config(total, count, width, seen, kv_heads, group, head_dim, processors, itemsize)
            found.setdefault(variant_of(config, total, few), config)
    return found


def compile_attention(
    heads: int, k_cache: Tensor, v_cache: Tensor, *, rows: int, tokens: int, visible: int, scratch: bool
) -> int:
    """Compile, by a launch of each, what up to so many rows and tokens with so long contexts ask for; returns how many.

    heads: of queries; k_cache, v_cache: as `staircase_attention` will be given them, and not written; scratch: for
    layouts that have scratch intervals, too. What this GPU cannot run is left out with a warning: it may never be
    asked for.
    """
    from triton.errors import TritonError

    from .attention_triton import processors_of
    from .overlap_triton import MOST_ROWS

    kv_heads, head_dim = k_cache.shape[2:]
    wanted = variants(
        rows,
        tokens,
        visible,
        kv_heads,
        heads // kv_heads,
        head_dim,
        processors_of(k_cache.device),
        k_cache.element_size(),
        MOST_ROWS,
    )
    done = 0
    for variant, config in wanted.items():
        count = config.block_m * kv_heads // heads if variant[-1] else MOST_ROWS + 1
        for intervals in (False, True) if scratch else (False,):
            try:
                _launch(heads, k_cache, v_cache, count, config, intervals)
            except TritonError as error:
                log.warning("attention does not run here with %s: %s", config, str(error)[:300])
            else:
                done += 1
    return done


def _launch(heads: int, k_cache: Tensor, v_cache: Tensor, tokens: int, config: Config, scratch: bool) -> None:
    """One row of so many tokens, which sees one slot."""
    from .attention_triton import plan, triton_attention

    ones = torch.ones(tokens, dtype=torch.int32, device=k_cache.device)
    layout = AttentionLayout(
        query_start=torch.tensor([0, tokens], dtype=torch.int32, device=k_cache.device),
        page_table=torch.zeros(1, 1, dtype=torch.int32, device=k_cache.device),
        visible=ones,
        scratch_start=ones if scratch else None,
        scratch_end=ones if scratch else None,
        max_query=tokens,
        max_visible=1,
    )
    plan(layout, tokens, heads, k_cache, config)
    # Only now: what the plan has written may be read early behind a kernel of torch's (see `overlap_triton.py`).
    q = torch.zeros(tokens, heads, k_cache.shape[3], dtype=k_cache.dtype, device=k_cache.device)
    triton_attention(q, k_cache, v_cache, layout, 1.0, config)


def _contexts(most: int) -> list[int]:
    """Bounds of contexts: those of small steps are rounded up, those of large ones are what they are."""
    rounded = [_LEAST_BOUND]
    while rounded[-1] < most:
        rounded.append(4 * rounded[-1])
    return sorted({*rounded, *(bound for bound in _powers(most) if bound >= 16)})


def _powers(most: int) -> list[int]:
    return [*(1 << bits for bits in range((most - 1).bit_length())), most]


def _above(most: int) -> int:
    """Counts of rows are rounded up, too."""
    return 1 << (most - 1).bit_length()


def _widths(most: int) -> list[int]:
    """Powers of two, and one and a half of them: positions times heads fill tiles of other sizes. Bounds of small
    steps' widths are rounded up to powers of four, and may pass all tokens."""
    some = {3 << bits for bits in range((most // 3).bit_length())}
    return sorted({*_powers(most), *some, 5, 7, 9, 11, 13, 2 * _above(most)})
