"""Rotary embedding and cache write against Hugging Face's Llama."""

from __future__ import annotations

import pytest
import torch

from linocut.kernels.rope import rope_and_cache_write, rope_table

SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "beta_fast": 16,
        "beta_slow": 2,
    },
]


def huggingface(dtype, scaling, head_dim, positions):
    """cos and sin [tokens, head_dim] as transformers computes them."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 10000.0, **scaling},
    )
    rotary = llama.LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, dtype=dtype), positions[None])
    return llama.apply_rotary_pos_emb, cos, sin


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_table_is_that_of_huggingface(scaling, dtype):
    positions = torch.arange(512)
    _, cos, sin = huggingface(dtype, scaling, 32, positions)
    expected = torch.cat([cos[0, :, :16], sin[0, :, :16]], dim=1)
    table = rope_table(512, 32, 10000.0, dtype, "cpu", scaling=scaling)
    assert table.dtype == dtype
    if scaling["rope_type"] == "default":
        assert torch.equal(table, expected)
    # A frequency's last bit, times position 511.
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_is_bitwise_that_of_huggingface(dtype):
    heads, kv_heads, head_dim, tokens = 6, 2, 32, 11
    positions = torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(0))
    apply, cos, sin = huggingface(dtype, {"rope_type": "default"}, head_dim, positions)
    fused = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    expected_q, expected_k = apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    table = rope_table(512, head_dim, 10000.0, dtype, "cpu")
    k_cache, v_cache = torch.zeros(2, 3, 8, kv_heads, head_dim, dtype=dtype)
    slots = torch.randperm(24)[:tokens]
    rotated = rope_and_cache_write(q, k, v, table, positions.int(), slots.int(), k_cache, v_cache)
    assert rotated.is_contiguous()
    assert torch.equal(rotated, expected_q[0].transpose(0, 1))
    assert torch.equal(k_cache.view(24, kv_heads, head_dim)[slots], expected_k[0].transpose(0, 1))
    assert torch.equal(v_cache.view(24, kv_heads, head_dim)[slots], v)
    untouched = torch.ones(24, dtype=torch.bool).index_fill(0, slots, False)
    assert not k_cache.view(24, -1)[untouched].any()
    assert not v_cache.view(24, -1)[untouched].any()


def test_partial_rotation_leaves_the_rest_of_the_head():
    q, k, v = torch.randn(3, 5, 2, 16)
    table = rope_table(32, 16, 1e4, torch.float32, "cpu", rotary_dim=8)
    whole = rope_table(32, 8, 1e4, torch.float32, "cpu")
    assert torch.equal(table, whole)
    positions = slots = torch.arange(5)
    caches = torch.zeros(2, 1, 8, 2, 16)
    narrow = torch.zeros(2, 1, 8, 2, 8)
    out = rope_and_cache_write(q, k, v, table, positions, slots, *caches)
    small = rope_and_cache_write(q[..., :8], k[..., :8], v[..., :8], whole, positions, slots, *narrow)
    assert torch.equal(out, torch.cat([small, q[..., 8:]], -1))
    assert torch.equal(caches[0][..., :8], narrow[0])
    assert torch.equal(caches[0][0, :5, :, 8:], k[..., 8:])


def test_a_table_in_float32_rotates_half_precision_exactly():
    """As LLaDA does: rounded once, at the end."""
    q, k, v = torch.randn(3, 9, 4, 16).bfloat16()
    positions = slots = torch.arange(9) + 40
    table = rope_table(64, 16, 1e4, torch.float32, "cpu")
    caches, exact = torch.zeros(2, 8, 8, 4, 16).bfloat16(), torch.zeros(2, 8, 8, 4, 16)
    found = rope_and_cache_write(q, k, v, table, positions, slots, *caches)
    expected = rope_and_cache_write(q.float(), k.float(), v.float(), table, positions, slots, *exact)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(caches, exact.bfloat16())
    rounded = rope_and_cache_write(q, k, v, table.bfloat16(), positions, slots, *caches.clone())
    assert not torch.equal(found, rounded)


def test_unknown_scaling_and_odd_dimensions_are_refused():
    with pytest.raises(ValueError, match="longrope"):
        rope_table(8, 16, 1e4, torch.float32, "cpu", scaling={"rope_type": "longrope"})
    with pytest.raises(ValueError, match="even"):
        rope_table(8, 16, 1e4, torch.float32, "cpu", rotary_dim=7)
