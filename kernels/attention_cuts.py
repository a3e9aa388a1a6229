"""How the Triton attention is cut: tiles of queries, steps of keys, programs that share the keys of a tile."""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import power_of_2


@dataclass(frozen=True)
class Config:
    """How the kernel is cut and compiled."""

    block_m: int  # rows of a tile: positions times heads per key head
    block_n: int  # keys per step
    splits: int  # programs that share a tile's keys
    num_warps: int
    num_stages: int


def choose_config(
    tokens: int,
    rows: int,
    max_query: int,
    max_visible: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    processors: int,
    itemsize: int = 2,
) -> Config:
    """Choose from host-known bounds only. The one place to tune; the comments say what an H200 said."""
    # A batch that mixes a prefill with many short rows is cut for its typical row, or those would mostly be padding.
    typical = max(1, min(max_query, 4 * tokens // max(rows, 1)))

    def programs(block_m: int) -> int:
        positions = block_m // group
        count: int = kv_heads * min(rows * -(-max_query // positions), tokens // positions + rows)
        return count

    needed = max(16, power_of_2(typical * group), power_of_2(group))
    half, row_bytes = itemsize == 2, head_dim * itemsize
    most = 128 if half and head_dim == 128 else 64
    if row_bytes > 512:
        most = 32  # a processor has no room for more
    block_m = max(min(needed, most), power_of_2(group))
    # Smaller tiles keep more processors busy, and waste less of a short causal triangle.
    if block_m == 128:
        few = programs(128) < processors if max_visible <= 2048 else 8 * programs(128) < processors
        if few or _is_short_prefill(max_query, max_visible):
            block_m = max(64, power_of_2(group))
    if half and block_m == 64 and 16 * programs(64) < processors:
        block_m = max(32, power_of_2(group))
    count = programs(block_m)
    # More splits than fill the processors cost more in the join than they win; small tiles come several to one.
    fill = processors * (4 if block_m == 16 else 2 if half and block_m <= 64 else 1)
    if half and block_m <= 32:
        # A program for each step: one that has two takes longer than some that have none.
        most = min(power_of_2(-(-max_visible // 64)), 32)
    elif half and block_m == 64:
        most = min(max_visible // 64, 16)
    else:
        most = min(max_visible // 128, 32 if block_m <= 32 else 16)
    splits = 1
    while splits * 2 <= min(fill // count, most):
        splits *= 2
    if splits == 2 and 2 * count > processors * (2 if needed <= block_m <= 64 else 1):
        splits = 1
    num_warps, num_stages = 4, 2
    if not half:
        block_n = 64 if row_bytes <= 256 else 32
    elif block_m >= 128:
        block_n, num_warps, num_stages = 128, 8, 4 if row_bytes <= 256 else 2
    elif _is_short_prefill(max_query, max_visible) and count >= 4 * processors:
        block_n = 32
    else:
        # Where a processor has one program, more keys at a time are more in flight.
        short = splits > 1 and (block_m == 64 or max_visible <= 128 * splits)
        block_n = 64 if short or row_bytes > 256 or (block_m == 64 and count * splits > processors) else 128
    block_n = max(16, min(block_n, power_of_2(max_visible)))
    return Config(block_m, block_n, splits, num_warps, num_stages)


def _is_short_prefill(max_query: int, max_visible: int) -> bool:
    return max_query >= 128 and max_visible <= 1024
