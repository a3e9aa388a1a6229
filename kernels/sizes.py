"""Sizes of launches, by plain arithmetic: `triton.cdiv` and `triton.next_power_of_2` are wrapped for kernels, and take
microseconds of the host for each launch."""

from __future__ import annotations


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def power_of_2(value: int) -> int:
    """The least power of two that is not below `value`, which is at least 1."""
    return 1 << (value - 1).bit_length()
