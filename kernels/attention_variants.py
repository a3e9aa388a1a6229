"""The variants of the Triton attention that batches may ask for, compiled before a request has to wait for one.

A kernel is compiled anew for each way in which it is cut. Steps at the start are of short texts, so that the first long
context, or the first full batch, would stop everybody for a second or two.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .attention import AttentionLayout
from .attention_cuts import Config, choose_config

_LEAST_BOUND = 512

# (how it is cut, whether it is one of few tokens): what makes a kernel another one.
Variant = tuple[tuple[int, ...], bool]


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

    few: tokens up to which a launch overlaps. Found by asking for sizes of all kinds: rows of one width, and rows of a
    few positions beside one that is longer.
    """
    found: dict[Variant, Config] = {}
    for count, width, seen in product(_powers(rows), _widths(tokens), _contexts(visible)):
        for beside in {0, 1, 4, width}:
            total = min(width + (count - 1) * beside, tokens)
            config = choose_config(total, count, width, seen, kv_heads, group, head_dim, processors, itemsize)
            cut = config.block_m, config.block_n, min(config.splits, 2), config.num_warps, config.num_stages
            found.setdefault(((*cut, int(config.splits > 8)), total <= few), config)
    return found


def compile_attention(
    heads: int, k_cache: Tensor, v_cache: Tensor, *, rows: int, tokens: int, visible: int, scratch: bool
) -> int:
    """Compile, by a launch of each, what up to so many rows and tokens with so long contexts ask for; returns how many.

    heads: of queries; k_cache, v_cache: as `staircase_attention` will be given them, and not written; scratch: for
    layouts that have scratch intervals, too.
    """
    from .attention_triton import plan, processors_of, triton_attention
    from .overlap_triton import MOST_ROWS

    kv_heads, head_dim = k_cache.shape[2:]
    group, device = heads // kv_heads, k_cache.device
    wanted = variants(
        rows, tokens, visible, kv_heads, group, head_dim, processors_of(device), k_cache.element_size(), MOST_ROWS
    )
    for (_, overlaps), config in wanted.items():
        count = config.block_m // group if overlaps else MOST_ROWS + 1
        q = torch.zeros(count, heads, head_dim, dtype=k_cache.dtype, device=device)
        ones = torch.ones(count, dtype=torch.int32, device=device)
        # Drafts are rows of few positions.
        for intervals in (None, ones) if scratch and overlaps else (None,):
            layout = AttentionLayout(
                query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
                page_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
                visible=ones,
                scratch_start=intervals,
                scratch_end=intervals,
                max_query=count,
                max_visible=1,
            )
            plan(layout, count, heads, k_cache, config)
            triton_attention(q, k_cache, v_cache, layout, 1.0, config)
    return len(wanted)


def _contexts(most: int) -> list[int]:
    """Bounds of contexts: those of small steps are rounded up to no less than the first."""
    return [bound for bound in _powers(most) if bound >= _LEAST_BOUND] or [most]


def _powers(most: int) -> list[int]:
    return [*(1 << bits for bits in range((most - 1).bit_length())), most]


def _widths(most: int) -> list[int]:
    """Powers of two, and one and a half of them: positions times heads fill tiles of other sizes."""
    return sorted({*_powers(most), *(3 << bits for bits in range((most // 3).bit_length())), 5, 7, 9, 11, 13})
