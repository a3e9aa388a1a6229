"""A draft head's drafts in C, and the candidates that they are chosen from: as torch finds them, every row its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from linocut.kernels import native
from linocut.kernels.draft_native import NativeDrafts
from linocut.kernels.linear_int8 import Int8Weight
from linocut.kernels.linear_native import NativeWeight
from linocut.kernels.statistics_native import native_top

VOCAB = 90


@pytest.fixture(autouse=True, scope="module")
def kernels(tmp_path_factory):
    if not native.load_native(tmp_path_factory.mktemp("native")):
        pytest.skip("no AVX2, or no C compiler")


@pytest.fixture(params=["float32", "int8"])
def pack(request):
    if request.param == "int8" and not native.multiplies_integers():
        pytest.skip("a CPU with AVX-512 and without VNNI")
    return {"float32": NativeWeight, "int8": Int8Weight}[request.param]


class Head:
    def __init__(self, pack, hidden):
        self.inputs, self.outputs = (
            pack((torch.randn(hidden, columns) * columns**-0.5).half().float()) for columns in (2 * hidden, hidden)
        )
        self.words, self.head = torch.randn(VOCAB, hidden) * 0.2, torch.randn(VOCAB, hidden) * hidden**-0.5
        self.drafts = NativeDrafts(self.inputs, self.outputs, self.words, self.head)

    def scores(self, normed, last, candidates):
        before = self.words[last]
        before = before * torch.rsqrt(before.square().mean(1, keepdim=True).clamp_min(1e-12))
        between = silu(self.inputs.multiply(torch.cat([normed, before], 1)))
        u = normed + self.outputs.multiply(between)
        return torch.einsum("rd,rkd->rk", u, self.head[candidates])


def asks(hidden, rows, masks, count=16):
    """normed, top, covered, last; both ends of the vocabulary are among the candidates, and stand before the masks."""
    top = torch.stack([torch.randperm(VOCAB - 2)[:count] + 1 for _ in range(rows * masks)])
    top[::2, 0], top[1::2, -1] = 0, VOCAB - 1
    last = torch.randint(VOCAB, (rows,))
    last[0], last[-1] = VOCAB - 1, 0
    return torch.randn(rows * masks, hidden), top, torch.rand(rows * masks), last


@pytest.mark.parametrize("hidden", [1, 7, 50, 64, 576])
@pytest.mark.parametrize("rows", range(1, 10))
def test_drafts_are_those_of_torch(pack, rows, hidden):
    masks, count = (rows * 5) % 12 + 1, 17 - rows
    head = Head(pack, hidden)
    normed, top, covered, last = asks(hidden, rows, masks, count)
    token, confidence = head.drafts.run(normed, top, covered, last)
    assert token.shape == confidence.shape == (rows, masks)
    # Activations in integers: a rounding may go the other way.
    slack = 1e-5 if pack is NativeWeight else 0.02
    for at in range(masks):
        entries = torch.arange(rows) * masks + at
        scores = head.scores(normed[entries], last, top[entries])
        last = token[:, at]
        places = (top[entries] == last[:, None]).int().argmax(1, keepdim=True)
        assert torch.equal(top[entries].gather(1, places)[:, 0], last)
        assert bool((scores.gather(1, places)[:, 0] >= scores.amax(1) - slack).all())
        expected = scores.softmax(1).gather(1, places)[:, 0] * covered[entries]
        torch.testing.assert_close(confidence[:, at], expected, rtol=4 * slack, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden", [50, 576])
def test_a_row_depends_on_no_other(pack, hidden, threads):
    head, rows, masks = Head(pack, hidden), 40, 3
    normed, top, covered, last = asks(hidden, rows, masks)

    def run(some):
        entries = (torch.arange(rows)[some, None] * masks + torch.arange(masks)).flatten()
        return head.drafts.run(normed[entries], top[entries], covered[entries], last[some])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = [torch.cat(parts) for parts in zip(*(run(slice(r, r + 1)) for r in range(rows)), strict=True)]
        for some in (*(slice(0, n) for n in range(1, rows + 1)), slice(3, 17)):
            for found, expected in zip(run(some), alone, strict=True):
                assert torch.equal(found, expected[some])
        normed[2 * masks], normed[5 * masks] = torch.nan, 1e30
        for found, expected in zip(run(slice(0, 9)), alone, strict=True):
            kept = [r for r in range(9) if r not in (2, 5)]
            assert torch.equal(found[kept], expected[kept])
    finally:
        torch.set_num_threads(before)


def test_the_first_of_equal_candidates_is_taken(pack):
    head = Head(pack, 64)
    normed, top, covered, last = asks(64, 1, 1)
    best = head.drafts.run(normed, top, covered, last)[0].item()
    twin = next(i for i in range(VOCAB) if i not in top[0])
    head.head[twin] = head.head[best]
    for pair in ([best, twin], [twin, best]):
        others = [i for i in top[0].tolist() if i != best][:12]
        token, confidence = head.drafts.run(normed, torch.tensor([others + pair]), torch.ones(1), last)
        assert token.item() == pair[0]
        assert confidence.item() <= 0.5


def test_what_is_no_number_is_a_candidate_that_nobody_trusts(pack):
    head = Head(pack, 64)
    normed, top, covered, last = asks(64, 2, 3)
    normed[1, 5] = torch.nan
    token, confidence = head.drafts.run(normed, top, covered, last)
    assert token[0, 1] in top[1]
    assert confidence[0, 1] == 0
    assert bool((confidence[0, [0, 2]] > 0).all())


def test_an_embedding_of_zeros_is_a_direction_like_any_other(pack):
    head = Head(pack, 64)
    head.words[3] = 0
    normed, top, covered, _ = asks(64, 1, 1)
    _, confidence = head.drafts.run(normed, top, covered, torch.tensor([3]))
    scores = head.scores(normed, torch.tensor([3]), top)
    torch.testing.assert_close(confidence[0], scores.softmax(1).amax(1) * covered, rtol=0.05, atol=0)


@pytest.mark.parametrize("last", [-1, VOCAB])
def test_ids_beyond_the_vocabulary_are_refused(pack, last):
    normed, top, covered, _ = asks(64, 2, 1)
    with pytest.raises(IndexError):
        Head(pack, 64).drafts.run(normed, top, covered, torch.tensor([0, last]))


class TestTop:
    """The candidates."""

    @pytest.mark.parametrize("width", [1, 5, 15, 16, 17, 24, 33, 5000, 49152])
    @pytest.mark.parametrize("rows", [0, 1, 7])
    def test_they_are_those_of_torch(self, rows, width):
        logits = torch.randn(rows, width) * 4
        logits[1::3] = logits[1::3].round()  # many ties
        logits[2::3] = logits[2::3].sort().values  # each one better than all before
        logits[3:4, : width // 2] = -torch.inf
        ids, covered = native_top(logits, 16)
        expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :16]
        assert torch.equal(ids, expected)
        exact = logits.double().softmax(1).gather(1, expected).sum(1).float()
        # Sums of equal terms are rounded one way: each of eight or sixteen lanes adds up thousands.
        torch.testing.assert_close(covered, exact, rtol=5e-5, atol=0)

    def test_any_layout_and_dtype_will_do(self):
        logits = torch.randn(4, 200).bfloat16()
        expected = native_top(logits.float(), 5)
        for found in (native_top(logits, 5), native_top(logits.float().T.contiguous().T, 5)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_banned_ids_come_last_the_lowest_first(self):
        logits = torch.full((2, 100), -torch.inf)
        logits[0, [98, 99, 40]] = torch.tensor([1.0, 2.0, 2.0])
        ids, covered = native_top(logits, 6)
        assert ids.tolist() == [[40, 99, 98, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
        assert covered[0] == 1
        assert covered[1] == 0

    @pytest.mark.parametrize("place", [0, 3, 20, 99])
    def test_nan_is_never_a_better_candidate(self, place):
        logits = torch.randn(3, 100)
        expected = native_top(logits, 16)
        logits[1, place], logits[2] = torch.nan, torch.nan
        ids, covered = native_top(logits, 16)
        assert torch.equal(ids[0], expected[0][0])
        assert torch.equal(covered, expected[1] * torch.tensor([1.0, 0.0, 0.0]))
        clean = logits[1].nan_to_num(-torch.inf)
        assert torch.equal(ids[1], clean.sort(descending=True, stable=True).indices[:16])
        assert ids[2].tolist() == list(range(16))

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_row_depends_on_no_other(self, threads):
        logits = torch.randn(9, 20000)
        logits[4, 7] = torch.nan
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            alone = [native_top(row[None], 16) for row in logits]
            ids, covered = native_top(logits, 16)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(ids, torch.cat([a for a, _ in alone]))
        assert torch.equal(covered, torch.cat([b for _, b in alone]))
