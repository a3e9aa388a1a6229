"""The CPU's kernels in C: exact where they say so, close to torch's elsewhere, and every row its own."""

from __future__ import annotations

import pytest
import torch
from own_rows import assert_rows_own
from torch.nn.functional import linear

from linocut.kernels import native
from linocut.kernels.attention import AttentionLayout, staircase_attention
from linocut.kernels.attention_native import attention_is_native
from linocut.kernels.attention_oracle import staircase_attention_oracle
from linocut.kernels.linear_native import NativeWeight
from linocut.kernels.norm import add_rms_norm, rms_norm, silu_and_mul
from linocut.kernels.ragged import ragged_case
from linocut.kernels.rope import rope_and_cache_write, rope_table
from linocut.kernels.statistics import SamplingRows, partial_statistics

SHAPES = [(576, 960), (1536, 65), (64, 3072), (96, 3), (33, 7), (1, 5)]  # (in, out)


@pytest.fixture(autouse=True, scope="module")
def kernels(tmp_path_factory):
    if not native.load_native(tmp_path_factory.mktemp("native")):
        pytest.skip("no AVX2, or no C compiler")


def half_weight(outputs, inputs):
    return (torch.randn(outputs, inputs) * 0.05).half().float()


def quantised(outputs, inputs, levels):
    """What a GGUF file in Q4_1 (levels 15) or Q8_0 (127) becomes in a float16 checkpoint."""
    groups = torch.randn(outputs, inputs // 32, 32)
    if levels == 15:
        low = groups.amin(2, keepdim=True)
        scale = ((groups.amax(2, keepdim=True) - low) / 15).half().float()
        low = low.half().float()
        codes = ((groups - low) / scale).round().clamp(0, 15)
    else:
        low = torch.zeros(())
        scale = (groups.abs().amax(2, keepdim=True) / 127).half().float()
        codes = (groups / scale).round().clamp(-127, 127)
    return (codes * scale + low).half().float().view(outputs, inputs)


class TestWeights:
    def test_the_fewest_bits_that_lose_nothing_are_found(self):
        assert NativeWeight(quantised(40, 64, 15)).format == "grid4"
        assert NativeWeight(quantised(40, 64, 127)).format == "grid8"
        assert NativeWeight(half_weight(40, 64)).format == "half"

    @pytest.mark.parametrize("levels", [15, 127])
    def test_one_value_off_its_grid_is_kept_too(self, levels):
        weight = quantised(40, 64, levels)
        middle = weight[37, 32:].sort().indices[16]
        weight[37, 32 + middle] = (weight[37, 32 + middle].half().view(torch.int16) + 1).view(torch.half).float()
        packed = NativeWeight(weight)
        assert packed.format == "half"
        assert torch.equal(packed.multiply(torch.eye(64)), weight.T)

    @pytest.mark.parametrize("levels", [15, 127])
    def test_every_weight_comes_back_bit_for_bit(self, levels):
        weight = torch.cat([quantised(300, 96, levels) * 2.0**power for power in (-6, 0, 3)])
        packed = NativeWeight(weight)
        assert packed.format == ("grid4" if levels == 15 else "grid8")
        assert torch.equal(packed.multiply(torch.eye(96)), weight.T)

    def test_groups_of_one_value(self):
        weight = torch.zeros(16, 64)
        weight[3], weight[5, 32:] = 0.25, -1.5
        assert torch.equal(NativeWeight(weight).multiply(torch.eye(64)), weight.T)

    @pytest.mark.parametrize("levels", [15, 127])
    def test_formats_give_the_same_bits(self, levels):
        weight, x = quantised(100, 192, levels), torch.randn(9, 192)
        plain = NativeWeight(torch.cat([half_weight(1, 192), weight]))
        assert plain.format == "half"
        assert torch.equal(NativeWeight(weight).multiply(x), plain.multiply(x)[:, 1:])


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 121])
def test_products_are_exact_to_the_rounding_of_sums(rows, bias, inputs, outputs):
    weight, x = half_weight(outputs, inputs), torch.randn(rows, inputs)
    b = torch.randn(outputs) if bias else None
    found = NativeWeight(weight, b).multiply(x)
    exact = linear(x.double(), weight.double(), None if b is None else b.double())
    bound = (inputs + 1) ** 0.5 * 2.0**-22 * (linear(x.abs(), weight.abs()) + (0 if b is None else b.abs()))
    assert found.shape == (rows, outputs)
    assert bool(((found - exact).abs() <= bound).all())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("levels", [15, 127, None])
def test_a_row_depends_on_no_other(levels, threads):
    weight = NativeWeight(half_weight(965, 576) if levels is None else quantised(965, 576, levels))
    assert_rows_own(weight.multiply, torch.randn(80, 576), threads, {(4,): float("nan")})


def test_low_rank_products_are_added_to_some_rows_of_part_of_a_tensor():
    down, up, x, y = (
        NativeWeight(half_weight(8, 64)),
        NativeWeight(half_weight(96, 8)),
        torch.randn(9, 64),
        torch.randn(9, 120),
    )
    expected = y.clone()
    expected[2:5, 10:106] += up.multiply(down.multiply(x[2:5]))
    up.add_low_rank(down, x, y[:, 10:106], slice(2, 5))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("size", [576, 50, 16, 1])
def test_norms_and_activation_are_those_of_torch(size):
    x, residual, weight = torch.randn(9, size), torch.randn(9, size) * 30, torch.randn(size)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, False, backend="native"), rms_norm(x, weight, 1e-5, False))
    normed, total = add_rms_norm(x, residual, weight, 1e-5, False, backend="native")
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5, False, backend="native"))
    gate_up = torch.cat([torch.linspace(-120, 120, 9 * size).view(9, size), torch.randn(9, size)], dim=1)
    torch.testing.assert_close(silu_and_mul(gate_up, backend="native"), silu_and_mul(gate_up), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("size", "rotary"), [(64, 64), (32, 16), (6, 6)])
def test_rope_gives_the_bits_of_torch(size, rotary):
    fused = torch.randn(7, 8, size)
    q, k, v = fused.split([4, 2, 2], dim=1)
    table = rope_table(100, size, 10000.0, torch.float32, "cpu", rotary_dim=rotary)
    positions = torch.tensor([3, 99, 0, 4, 5, 5, 6], dtype=torch.int32)
    slots = torch.tensor([17, 31, 2, 1, 30, 4, 9], dtype=torch.int32)
    caches = [[torch.randn(2, 16, 2, size) for _ in range(2)]]
    caches.append([cache.clone() for cache in caches[0]])
    expected = rope_and_cache_write(q, k, v, table, positions, slots, *caches[0])
    found = rope_and_cache_write(q, k, v, table, positions, slots, *caches[1], backend="native")
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


class TestAttention:
    @pytest.mark.parametrize("group", [1, 3, 4, 7])
    @pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
    @pytest.mark.parametrize("scratch", [False, True])
    def test_ragged_rows_match_the_definition(self, scratch, head_dim, group):
        for seed in range(3):
            case = ragged_case(
                seed, group=group, scratch=scratch, head_dim=head_dim, padding=seed, padding_rows=seed % 3
            )
            assert attention_is_native(*case)
            expected = staircase_attention_oracle(*case, head_dim**-0.5)
            found = staircase_attention(*case, head_dim**-0.5, backend="native")
            assert (found.double() - expected).abs().max() <= 2e-5

    def test_a_query_depends_on_no_other(self):
        q, k_cache, v_cache, layout = ragged_case(3, group=3, head_dim=64, scratch=True)
        whole = staircase_attention(q, k_cache, v_cache, layout, 0.125, backend="native")
        assert layout.scratch_start is not None
        assert layout.scratch_end is not None
        for row, (first, last) in enumerate(zip(layout.query_start[:-1], layout.query_start[1:], strict=True)):
            for token in range(int(first), int(last)):
                at = slice(token, token + 1)
                alone = AttentionLayout(
                    query_start=torch.tensor([0, 1], dtype=torch.int32),
                    page_table=layout.page_table[row : row + 1],
                    visible=layout.visible[at],
                    scratch_start=layout.scratch_start[at],
                    scratch_end=layout.scratch_end[at],
                    max_query=1,
                    max_visible=layout.max_visible,
                )
                found = staircase_attention(q[at].contiguous(), k_cache, v_cache, alone, 0.125, backend="native")
                assert torch.equal(found, whole[at])

    def test_other_head_sizes_are_torchs(self):
        case = ragged_case(4, head_dim=24)
        assert not attention_is_native(*case)
        assert torch.equal(
            staircase_attention(*case, 0.2, backend="native"), staircase_attention(*case, 0.2, backend="torch")
        )


def test_a_compiler_that_fails_is_an_oserror(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises((OSError, native.subprocess.SubprocessError)):
        native._compiled(tmp_path)


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512"])
def test_sources_compile_for_processors_that_are_not_here(instructions, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "instructions", lambda: instructions)
    assert native._compiled(tmp_path).exists()


def test_a_library_is_compiled_once(tmp_path):
    made = native._compiled(tmp_path)
    before = made.stat().st_mtime_ns
    assert native._compiled(tmp_path) == made
    assert made.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


class TestStatistics:
    @pytest.mark.parametrize("width", [1, 15, 33, 5000])
    @pytest.mark.parametrize("rows", [0, 1, 7])
    def test_they_are_those_of_torch(self, rows, width):
        logits = torch.randn(rows, width) * 8
        logits[:, width // 3] = logits[:, width // 2] = 40.0  # a tie
        logits[2:4, : width - 1] = -torch.inf
        found, expected = (partial_statistics(logits.clone(), 11, None, backend=name) for name in ("native", "torch"))
        assert torch.equal(found.best_id, expected.best_id)
        assert torch.equal(found.best_logit, expected.best_logit)
        assert torch.equal(found.maximum, expected.maximum)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=0)

    def test_where_everything_is_banned_numbers_stay_finite(self):
        found = partial_statistics(torch.full((2, 40), -torch.inf), 0, None, backend="native")
        assert found.maximum.isfinite().all()
        assert torch.equal(found.total, torch.zeros(1, 2))

    def test_nan_is_the_greatest(self):
        logits = torch.randn(3, 50)
        logits[1, 20] = logits[1, 30] = torch.nan
        found = partial_statistics(logits, 0, None, backend="native")
        assert found.best_id[0, 1] == 20
        assert found.total.isnan().tolist() == [[False, True, False]]

    def test_a_row_is_its_own_also_beside_one_that_samples(self):
        logits = torch.randn(9, 3000)
        alone = [partial_statistics(row[None], 0, None, backend="native") for row in logits]
        greedy = partial_statistics(logits, 0, None, backend="native")
        numbers = torch.arange(9)
        temperature = torch.where(numbers == 4, 0.7, 0.0)
        off = torch.zeros(9)
        rows = SamplingRows(temperature, off.int(), off + 1, off, *[numbers] * 4, filtered=False, sampled=True)
        sampled = partial_statistics(logits, 0, rows, backend="native", entropy=True)
        for at in (0, 1, 2, 3, 5, 6, 7, 8):
            for found in (greedy, sampled):
                assert torch.equal(found.total[:, at], alone[at].total[:, 0])
                assert torch.equal(found.maximum[:, at], alone[at].maximum[:, 0])
