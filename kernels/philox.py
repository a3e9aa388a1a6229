"""Counter-based random numbers: Philox-4x32 (Salmon et al. 2011), the same words in torch and in Triton.

A number depends on nothing but its request seed, choice index, position, block step and vocabulary id, so it is the
same wherever the row lies in a batch, however the vocabulary is sliced, and whether or not a request was preempted.

    key = the request's seed, 64 bits      counter = (vocabulary id // 4, position, step, choice)      word = id % 4
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Backend

# Philox-4x32-7 is the shortest that its authors saw pass BigCrush (section 4); 10 rounds cost the CPU a third more.
ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
LARGEST_BELOW_ONE = 1.0 - 2.0**-24
# No two draws are further apart: 33 log 2 for the smallest v of `gumbel_from_words`, -log(24 log 2) for the largest.
GUMBEL_RANGE = 25.7


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> list[Tensor]:
    """Philox-4x32. counter, key: int64 tensors of 32-bit values, of shapes that broadcast together.

    Returns four int64 tensors of the broadcast shape, each holding one 32-bit word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # Words that are only xor-ed may carry dirt above bit 31; products wrap at 2**64, which leaves both halves intact.
    for turn in range(rounds):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0 = c3 ^ ((k1 + turn * KEY_STEPS[1]) & _MASK)
        high1 = c1 ^ ((k0 + turn * KEY_STEPS[0]) & _MASK)
        c0 = ((p1 >> 32) ^ high1).bitwise_and_(_MASK)
        c2 = ((p0 >> 32) ^ high0).bitwise_and_(_MASK)
        c1, c3 = p1, p0
    words = torch.broadcast_tensors(c0, c1 & _MASK, c2, c3 & _MASK)
    return list(words)


def seed_key(seed: Tensor) -> tuple[Tensor, Tensor]:
    """Split int64 seeds into the two 32-bit key words."""
    return seed & _MASK, (seed >> 32) & _MASK


def gumbel_from_words(words: Tensor) -> Tensor:
    """Turn 32-bit words (int64) into float32 Gumbel(0, 1) noise: -log(-log(1 - v)), v = (word + 1/2) / 2**32.

    log1p keeps full precision where it matters: the largest noise comes from the smallest v. (The usual
    u = (24 bits + 1/2) / 2**24 rounds to 1 in float32 once in 2**25 draws, which is infinite noise for a random id.)
    """
    v = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_BELOW_ONE)
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
    step: Tensor,
    vocab_start: int,
    vocab: int,
    *,
    backend: Backend = "torch",
) -> Tensor:
    """Gumbel noise for the vocabulary ids [vocab_start, vocab_start + vocab): [M, vocab] float32.

    seed: [M] int64; choice, position, step: [M] int32 or int64.
    """
    if backend == "triton":
        from .philox_triton import triton_gumbel_noise

        return triton_gumbel_noise(seed, choice, position, step, vocab_start, vocab)
    first = vocab_start // 4
    quads = torch.arange(first, (vocab_start + vocab + 3) // 4, device=seed.device)[None, :]
    words = noise_words(seed[:, None], choice[:, None], position[:, None], step[:, None], quads)
    skip = vocab_start - 4 * first
    return gumbel_from_words(words.flatten(-2)[:, skip : skip + vocab])


def noise_words(seed: Tensor, choice: Tensor, position: Tensor, step: Tensor, quads: Tensor) -> Tensor:
    """The words of the ids 4 * quads + (0, 1, 2, 3); all arguments broadcast. Returns int64 [..., 4]."""
    return torch.stack(philox((quads, _word(position), _word(step), _word(choice)), seed_key(seed)), dim=-1)


def _word(value: Tensor) -> Tensor:
    return value.long() & _MASK
