"""What each rank holds of a model and of its vocabulary; the ranks are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from linocut.engine.config import EngineConfig
from linocut.engine.errors import ConfigError, ModelError
from linocut.engine.models.backbone import Backbone, backbone_from_config
from linocut.engine.models.experts import Experts
from linocut.engine.models.names import NamedWeights
from linocut.engine.models.weights import RandomWeights
from linocut.engine.parallel.ranks import ALONE, Ranks
from linocut.engine.parallel.split import SplitWeights, check_split, part_of
from linocut.engine.parallel.vocabulary import VocabShare
from linocut.kernels.filters import filter_cutoff
from linocut.kernels.statistics import (
    SamplingRows,
    VocabStatistics,
    merge_partials,
    partial_statistics,
    vocab_statistics,
)

SIZE = 3
ROWS, HIDDEN = 6, 8
# Of 3 ranks the last one holds as many ids as the others, fewer, or none.
VOCABULARIES = [48, 50, 61, 8]
CPU = torch.device("cpu")
T = TypeVar("T")


class ThreadRanks(Ranks):
    """Ranks that meet in memory."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: dict[int, Tensor]) -> None:
        super().__init__(rank, size)
        self._meeting, self._table = meeting, table

    def gather(self, x: Tensor) -> Tensor:
        self._table[self.rank] = x.clone()
        self._meeting.wait(60)
        found = torch.stack([self._table[rank] for rank in range(self.size)])
        self._meeting.wait(60)
        return found

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(self.gather(x).sum(0))


def on_all(work: Callable[[Ranks], T], size: int = SIZE) -> list[T]:
    meeting = threading.Barrier(size)
    table: dict[int, Tensor] = {}
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadRanks(rank, size, meeting, table)), range(size)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share_of(table: Tensor, share: VocabShare) -> Tensor:
    """This rank's rows of a table [vocab, ...], as wide as every share."""
    held = table[share.start : share.start + share.held]
    return torch.cat([held, held.new_zeros((share.width - share.held, *table.shape[1:]))])


def logits_of(whole: Tensor, share: VocabShare) -> Tensor:
    """This rank's columns of logits [rows, vocab], with those of no id."""
    return share.fill(share_of(whole.T, share).T.contiguous())


# ---------------------------------------------------------------------- the vocabulary


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_id_is_held_by_one_rank(vocab: int) -> None:
    shares = [VocabShare(vocab, Ranks(rank, SIZE)) for rank in range(SIZE)]
    assert len({share.width for share in shares}) == 1
    assert [i for s in shares for i in range(s.start, s.start + s.held)] == list(range(vocab))
    inside = torch.stack([share.own(torch.arange(-1, vocab))[1] for share in shares])
    assert inside.sum(0).tolist() == [0, *[1] * vocab]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_embedding_and_a_few_scores_are_looked_up_over_all_ranks(vocab: int) -> None:
    table, hidden = drawn(vocab, HIDDEN), drawn(ROWS, HIDDEN, seed=1)
    ids = torch.arange(ROWS * 5).reshape(ROWS, 5) * 7 % vocab

    def work(ranks: Ranks) -> tuple[Tensor, Tensor]:
        share = VocabShare(vocab, ranks)
        mine = share_of(table, share)
        return share.embed(ids[:, 0], mine), share.scores(hidden, ids, mine)

    for embedded, scores in on_all(work):
        assert torch.equal(embedded, table[ids[:, 0]])
        torch.testing.assert_close(scores, torch.einsum("rd,rkd->rk", hidden, table[ids]))


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_logits_and_what_is_read_of_them_are_those_of_the_whole_vocabulary(vocab: int) -> None:
    logits = drawn(ROWS, vocab).masked_fill_(torch.arange(vocab) % 11 == 3, -torch.inf)
    ids = logits.topk(4, dim=1).indices

    def work(ranks: Ranks) -> dict[str, Tensor]:
        share = VocabShare(vocab, ranks)
        mine = logits_of(logits, share)
        values, best = share.top(mine, 7)
        few = share.spread(ids, logits.gather(1, ids))
        return {
            "whole": share.whole(mine),
            "values": values,
            "best": best,
            "few": share.whole(few),
            "total": share.log_total(mine),
            "probability": share.whole(share.softmax(mine)),
        }

    values, best = logits.topk(7, dim=1)
    expected = {
        "whole": logits,
        "values": values,
        "best": best,
        "few": torch.full_like(logits, -torch.inf).scatter_(1, ids, logits.gather(1, ids)),
        "total": logits.logsumexp(1),
        "probability": logits.softmax(1),
    }
    for found in [*on_all(work), work(ALONE)]:
        for name, want in expected.items():
            torch.testing.assert_close(found[name], want, msg=name)


def sampling_rows(filtered: bool) -> SamplingRows:
    places = torch.arange(ROWS, dtype=torch.int32)
    return SamplingRows(
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.3, 0.9, 0.8]),
        top_k=torch.tensor([0, 0, 5, 0, 9, 1], dtype=torch.int32),
        top_p=torch.tensor([1.0, 0.8, 1.0, 1.0, 0.7, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0, 0.0]),
        seed=torch.arange(ROWS) * 977,
        choice=places,
        position=places + 4,
        step=places % 3,
        filtered=filtered,
        sampled=True,
    )


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("filtered", [False, True])
def test_joined_statistics_are_those_of_the_whole_vocabulary(vocab: int, filtered: bool) -> None:
    logits, sampling = drawn(ROWS, vocab) * 3, sampling_rows(filtered)
    logits[2, :-2] = -torch.inf  # a rank of which a row may choose nothing
    after = torch.arange(ROWS) % 2 == 0
    options: dict[str, Any] = {"entropy": True, "margin": True, "top_k": 4}

    def work(ranks: Ranks) -> VocabStatistics:
        share = VocabShare(vocab, ranks)
        mine = logits_of(logits, share)
        cutoff = filter_cutoff(share.whole(mine), sampling) if filtered else None
        partials = partial_statistics(mine, share.start, sampling, cutoff=cutoff, kept_total=True, **options)
        return merge_partials(share.join(partials), sampling, filtered_confidence=after)

    want = vocab_statistics(logits, sampling, filtered_confidence=after, **options)
    for found in on_all(work):
        for name, value in vars(want).items():
            torch.testing.assert_close(getattr(found, name), value, msg=name)


# ---------------------------------------------------------------------- the layers


def backbone(**changes: Any) -> Backbone:
    """A layer with every kind of bias, six heads and three for K/V."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 30,
        "vocab_size": 50,
        "attention_bias": True,
        "mlp_bias": True,
    }
    return replace(backbone_from_config(config), **changes)


class OneTensor:
    """Whatever is asked for is this tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __contains__(self, name: str) -> bool:
        return True

    def get(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
        assert tuple(self.tensor.shape) == shape
        return self.tensor[part].clone()


def parts(name: str, whole: Tensor, b: Backbone) -> list[Tensor]:
    def part(rank: int) -> Tensor:
        share = VocabShare(b.vocab, Ranks(rank, SIZE))
        return SplitWeights(NamedWeights(OneTensor(whole), b), b, share).get(name, tuple(whole.shape))

    return [part(rank) for rank in range(SIZE)]


@pytest.mark.parametrize(
    ("module", "inputs", "outputs"),
    [("self_attn.q_proj", 48, 48), ("self_attn.k_proj", 48, 24), ("self_attn.v_proj", 48, 24),
     ("mlp.gate_proj", 48, 30), ("mlp.up_proj", 48, 30), ("mlp.experts.7.gate_proj", 48, 12),
     ("mlp.experts.11.up_proj", 48, 12), ("mlp.shared_experts.up_proj", 48, 15)],
)  # fmt: skip
def test_what_reads_the_residual_stream_is_cut_by_rows(module: str, inputs: int, outputs: int) -> None:
    x, weight, bias = drawn(4, inputs), drawn(outputs, inputs, seed=1), drawn(outputs, seed=2)
    name, b = f"model.layers.0.{module}", backbone()
    weights, biases = parts(f"{name}.weight", weight, b), parts(f"{name}.bias", bias, b)
    found = torch.cat([x @ w.T + c for w, c in zip(weights, biases, strict=True)], dim=1)
    torch.testing.assert_close(found, x @ weight.T + bias)
    assert len({w.shape for w in weights}) == 1


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj", "mlp.experts.3.down_proj"])
def test_what_writes_to_it_is_cut_by_columns_and_sums_up(module: str) -> None:
    x, weight, bias = drawn(4, 30), drawn(48, 30, seed=1), drawn(48, seed=2)
    name, b = f"model.layers.0.{module}", backbone()
    weights, biases = parts(f"{name}.weight", weight, b), parts(f"{name}.bias", bias, b)
    found = sum(p @ w.T + c for p, w, c in zip(x.chunk(SIZE, 1), weights, biases, strict=True))
    torch.testing.assert_close(found, x @ weight.T + bias)


@pytest.mark.parametrize(("module", "sizes"), [("self_attn.qkv_proj", (48, 24, 24)), ("mlp.gate_up_proj", (30, 30))])
def test_an_adapter_follows_each_of_the_projections_that_it_packs(module: str, sizes: tuple[int, ...]) -> None:
    x, down, up = drawn(4, 48), drawn(2, 48, seed=1), drawn(sum(sizes), 2, seed=2)
    name, b = f"model.layers.0.{module}.adapter", backbone()
    downs, ups = parts(f"{name}.down", down, b), parts(f"{name}.up", up, b)
    local = [x @ d.T @ u.T for d, u in zip(downs, ups, strict=True)]
    pieces = [y.split([size // SIZE for size in sizes], 1) for y in local]
    found = torch.cat([piece[at] for at in range(len(sizes)) for piece in pieces], dim=1)
    torch.testing.assert_close(found, x @ down.T @ up.T)


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
def test_an_adapter_of_a_part_of_its_input_sums_up(module: str) -> None:
    x, down, up = drawn(4, 30), drawn(2, 30, seed=1), drawn(48, 2, seed=2)
    name, b = f"model.layers.0.{module}.adapter", backbone()
    downs, ups = parts(f"{name}.down", down, b), parts(f"{name}.up", up, b)
    found = sum(p @ d.T @ u.T for p, d, u in zip(x.chunk(SIZE, 1), downs, ups, strict=True))
    torch.testing.assert_close(found, x @ down.T @ up.T)


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.gate.weight",
     "model.layers.0.mlp.gate.expert_bias", "model.mask_embedding", "draft_head.input"],
)  # fmt: skip
def test_what_is_small_is_whole_everywhere(name: str) -> None:
    whole = drawn(6, 6)
    assert all(torch.equal(part, whole) for part in parts(name, whole, backbone()))


def test_queries_keys_and_values_of_one_tensor_are_cut_each() -> None:
    b = backbone(names="llada2")
    whole = drawn(48 + 24 + 24, 48)
    for at, (module, rows) in enumerate([("q", 48), ("k", 24), ("v", 24)]):
        want = whole.split([48, 24, 24])[at].chunk(SIZE)
        for rank in range(SIZE):
            split = SplitWeights(NamedWeights(OneTensor(whole), b), b, VocabShare(50, Ranks(rank, SIZE)))
            found = split.get(f"model.layers.0.self_attn.{module}_proj.weight", (rows, 48))
            assert torch.equal(found, want[rank])


def test_parts_of_random_weights_are_of_one_model() -> None:
    whole = RandomWeights(torch.float32, CPU).get("a.weight", (6, 4))
    lower = RandomWeights(torch.float32, CPU).get("a.weight", (6, 4), (slice(3, 6),))
    assert torch.equal(lower, whole[3:])


def test_a_rank_s_layers_are_a_part_of_the_model_s() -> None:
    part = part_of(backbone(experts=Experts(8, 2, 12, 24)), SIZE)
    assert (part.heads, part.kv_heads, part.intermediate, part.hidden, part.vocab) == (2, 1, 10, 48, 50)
    assert part.experts is not None
    assert (part.experts.count, part.experts.intermediate, part.experts.shared_intermediate) == (8, 4, 8)
    assert part.kv_bytes_per_position(4) * SIZE == backbone().kv_bytes_per_position(4)


# ---------------------------------------------------------------------- what cannot be split


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kv_heads": 2}, "2 key-value heads"),
        ({"intermediate": 31}, "31 intermediate features"),
        ({"experts": Experts(8, 2, 13)}, "13 intermediate features of an expert"),
        ({"experts": Experts(8, 2, 12, 25)}, "25 intermediate features of the shared experts"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(changes: dict[str, Any], what: str) -> None:
    check_split(backbone(), SIZE)
    with pytest.raises(ConfigError, match=f"tensor_parallel_size 3 does not divide the model's {what}"):
        check_split(backbone(**changes), SIZE)


def test_int8_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        EngineConfig(model="", quantization="int8", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="at least 1"):
        EngineConfig(model="", tensor_parallel_size=0)


def test_a_packed_tensor_of_other_sizes_is_refused() -> None:
    b = backbone(names="llada2")
    weights = NamedWeights(OneTensor(drawn(96, 48)), b)
    with pytest.raises(ModelError, match="holds 24 rows"):
        weights.get("model.layers.0.self_attn.k_proj.weight", (48, 48))
