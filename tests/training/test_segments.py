"""Packing, anchors, noise and the visibility rule, against definitions written out pair by pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import make_documents, make_settings
from torch import Tensor

from linocut.training.attention import MaskBuffers, Visibility, dense_mask
from linocut.training.documents import Documents, Epochs, Rows, gather_rows, pack_rows
from linocut.training.segments import Noise, clean_visibility, draw_segments
from linocut.training.settings import AdaptSettings

LENGTHS, PROMPTS = [30, 17, 40, 9, 22, 50, 12], [10, 3, 20, 4, 2, 30, 5]


def pack(length: int = 64) -> tuple[Documents, Rows, np.ndarray]:
    documents = make_documents(LENGTHS, PROMPTS)
    packed = pack_rows(documents.lengths.numpy(), np.arange(len(LENGTHS)), length, seed=3)
    return documents, gather_rows(documents, torch.from_numpy(packed), length), packed


def settings(tmp_path: Path, **changes: object) -> AdaptSettings:
    return make_settings(tmp_path, **changes)


def test_packing_lays_every_document_whole_into_exactly_one_row() -> None:
    documents, rows, packed = pack()
    assert sorted(packed[packed >= 0].tolist()) == list(range(len(LENGTHS)))
    for row, members in enumerate(packed):
        at = 0
        for number in members[members >= 0].tolist():
            begin, size = int(documents.offsets[number]), LENGTHS[number]
            assert rows.tokens[row, at : at + size].tolist() == documents.tokens[begin : begin + size].tolist()
            assert rows.positions[row, at : at + size].tolist() == list(range(size))
            assert rows.response[row, at : at + size].tolist() == [i >= PROMPTS[number] for i in range(size)]
            at += size
        assert not rows.filled[row, at:].any()
        assert at <= 64


def test_packing_fills_rows_of_many_documents_almost_wholly() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(50, 500, 4000)
    packed = pack_rows(lengths, np.arange(4000), 1024, seed=0)
    assert lengths.sum() / (len(packed) * 1024) > 0.97


def test_rows_of_a_run_depend_on_the_cursor_alone() -> None:
    documents = make_documents(LENGTHS * 5, PROMPTS * 5)
    numbers = np.arange(len(documents))

    def epochs() -> Epochs:
        return Epochs(documents, numbers, 64, 7, torch.device("cpu"))

    whole, epoch, cursor, taken = epochs(), 0, 0, []
    for _ in range(8):
        taken.append((epoch, cursor))
        rows, epoch, cursor = whole.take(epoch, cursor, 4)
    again, *_ = epochs().take(*taken[-1], 4)
    assert torch.equal(rows, again)
    assert taken[-1][0] > 0


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("logit_source", ["previous", "own"])
@pytest.mark.parametrize("context", ["token-causal", "block-causal"])
def test_segments_are_what_their_definition_says(
    tmp_path: Path, m: int, partial: bool, logit_source: str, context: str
) -> None:
    mode = "gated" if context == "token-causal" else "full"
    s = settings(tmp_path, context=context, logit_source=logit_source, segments=[m], noisy_rows=128, mode=mode)
    _, rows, _ = pack()
    drawn = draw_segments(rows, Noise(m, partial), s, torch.Generator().manual_seed(1))
    mask = dense_mask(drawn.visibility, 64 + 128)[:, 0]
    assert mask.any(-1).all()
    shift = 1 if logit_source == "previous" else 0
    count = 128 // m // (2 if partial else 1) * (2 if partial else 1)
    for b in range(len(rows.tokens)):
        firsts = []
        for segment in range(count):
            lines = range(segment * m, segment * m + m)
            own = [bool(mask[b, lines[0], 64 + n]) for n in range(128)]
            assert own == [n in lines for n in range(128)]
            context_keys = mask[b, lines[0], :64].nonzero().flatten().tolist()
            if context == "token-causal":
                first = context_keys[-1] + 1
            else:  # the first block of a document sees nothing clean
                first = int(drawn.target[b, lines[0]]) - shift
            firsts.append(first)
            start, end = int(rows.start[b, first]), int(rows.end[b, first])
            assert context_keys == list(range(start, first))
            if context == "block-causal":
                assert (first - start) % m == 0
            for i, n in enumerate(lines):
                position = first + i
                assert torch.equal(mask[b, n], mask[b, lines[0]])
                assert drawn.positions[b, n] == position - start
                prompt = position < end and not rows.response[b, position]
                if not drawn.masked[b, n]:
                    assert drawn.tokens[b, n] == rows.tokens[b, position]
                    assert position < end
                if prompt:
                    assert not drawn.masked[b, n]
                elif not partial or position >= end:
                    assert drawn.masked[b, n]
                target = position + shift
                inside = i + shift < m
                hidden = bool(drawn.masked[b, n + shift]) if inside else True
                learnt = target < end and bool(rows.response[b, target]) and hidden
                assert float(drawn.weight[b, n]) == float(learnt)
                if learnt:
                    assert drawn.target[b, n] == target
        assert firsts == sorted(firsts)
        assert drawn.weight[b, count * m :].sum() == 0


def test_a_pair_of_partly_masked_segments_hides_every_position_once(tmp_path: Path) -> None:
    _, rows, _ = pack()
    s = settings(tmp_path, noisy_rows=128)
    drawn = draw_segments(rows, Noise(4, True), s, torch.Generator().manual_seed(0))
    masked = drawn.masked.view(len(rows.tokens), 16, 2, 4)
    first = drawn.visibility.context_end.long()
    end = rows.end.gather(1, first)
    inside = (first + drawn.offset < end).view(masked.shape)
    assert (masked.sum(2) == torch.where(inside[:, :, 0], 1, 2)).all()


def test_first_positions_cover_all_of_an_answer_before_any_repeats(tmp_path: Path) -> None:
    documents = make_documents([60], [10])
    rows = gather_rows(documents, torch.tensor([[0] + [-1] * 63]), 64)
    drawn = draw_segments(rows, Noise(2, False), settings(tmp_path), torch.Generator().manual_seed(0))
    firsts = set(drawn.visibility.context_end[0].tolist())
    assert firsts == set(range(10, 59))  # the last position has no target: a row predicts the token after its own


def test_block_causal_clean_rows_see_to_the_end_of_their_block() -> None:
    _, rows, _ = pack()
    mask = dense_mask(clean_visibility(rows, "block-causal", 4), 64)[:, 0]
    for b in range(len(rows.tokens)):
        for q in range(64):
            start, end = int(rows.start[b, q]), int(rows.end[b, q])
            stop = min(start + ((q - start) // 4 + 1) * 4, end)
            assert mask[b, q].nonzero().flatten().tolist() == list(range(start, stop))


def _from_tiles(buffers: MaskBuffers, visibility: Visibility) -> Tensor:
    """What flex attention would compute: full tiles whole, partial tiles by the rule; both of its tables agree."""
    mask = buffers.update(visibility)
    assert not isinstance(mask, Tensor)
    rows, queries = visibility.own_start.shape
    tiles_k = buffers.keys // 128
    dense = torch.zeros(rows, queries, buffers.keys, dtype=torch.bool)
    backward = torch.zeros_like(dense)
    b, q, k = torch.meshgrid(torch.arange(rows), torch.arange(queries), torch.arange(buffers.keys), indexing="ij")
    rule = mask.mask_mod(b, torch.zeros_like(b), q, k)
    for row in range(rows):
        for tq in range(queries // 128):
            lines = slice(tq * 128, tq * 128 + 128)
            for counts, indices, full in (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            ):
                for tk in indices[row, 0, tq, : int(counts[row, 0, tq])].tolist():
                    keys = slice(tk * 128, tk * 128 + 128)
                    dense[row, lines, keys] = True if full else rule[row, lines, keys]
        for tk in range(tiles_k):
            keys = slice(tk * 128, tk * 128 + 128)
            for counts, indices, full in (
                (mask.q_num_blocks, mask.q_indices, False),
                (mask.full_q_num_blocks, mask.full_q_indices, True),
            ):
                for tq in indices[row, 0, tk, : int(counts[row, 0, tk])].tolist():
                    lines = slice(tq * 128, tq * 128 + 128)
                    backward[row, lines, keys] = True if full else rule[row, lines, keys]
    assert torch.equal(dense, backward)
    return dense


@pytest.mark.parametrize("m", [2, 3, 8])
def test_the_block_mask_of_flex_attention_is_the_dense_rule(tmp_path: Path, m: int) -> None:
    documents = make_documents([300, 130, 90, 200, 256, 20], [40, 30, 10, 100, 1, 3])
    packed = pack_rows(documents.lengths.numpy(), np.arange(6), 384, seed=0)
    rows = gather_rows(documents, torch.from_numpy(packed), 384)
    s = settings(tmp_path, length=384, noisy_rows=512, segments=[m])
    device = torch.device("cpu")
    clean, noisy = MaskBuffers(len(packed), 384, 384, device, True), MaskBuffers(len(packed), 512, 896, device, True)
    for _ in range(2):  # the buffers are reused
        drawn = draw_segments(rows, Noise(m, False), s, None)
        visible = clean_visibility(rows, "token-causal", 1)
        assert torch.equal(_from_tiles(clean, visible), dense_mask(visible, 384)[:, 0])
        assert torch.equal(_from_tiles(noisy, drawn.visibility), dense_mask(drawn.visibility, 896)[:, 0])
