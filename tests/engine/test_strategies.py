"""Every strategy on every family that has it: a row's text is its own, whoever shares the batch."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from replays import replaying
from tiny_engines import GOLDEN, engine, prompt_of, request, run
from torch.overrides import TorchFunctionMode

from linocut.engine import stages
from linocut.engine.core import EngineCore
from linocut.engine.decoding.parameters import valid_names
from linocut.engine.decoding.registry import offered, strategy_classes
from linocut.engine.family import family_from_config
from linocut.engine.loading import read_config
from linocut.engine.messages import AddRequest

FAMILIES = ("fast_dllm_v2", "sdar", "sdar16", "sdar_moe", "llada2", "llada", "dream", "wedlm", "causal")
# What makes a strategy do more than its defaults would on random weights.
LIVELY: dict[str, list[dict[str, Any]]] = {
    "threshold": [{"threshold": 0.5}, {"threshold": 0.3, "halt": "linear", "halt_high": 2.0, "halt_low": 0.5}],
    "static": [{"order": "entropy"}, {"order": "margin", "denoising_steps": 3}, {"order": "sequential"}],
    "entropy": [{"entropy": 1.5}],
    "entropy_bound": [{"gamma": 1.0}],
    "factor": [{"factor": 1.5}],
    "hierarchical": [
        {"threshold": 0.6, "low_threshold": 0.3},
        {"threshold": 0.6, "low_threshold": 0.3, "remask_threshold": 0.3},
        {"threshold": 0.6, "low_threshold": 0.3, "remask_threshold": 0.9},
    ],
    "credit": [{"threshold": 0.5, "credit_weight": 2.0}],
    "edit": [{"threshold": 0.5, "edit_threshold": 0.3, "post_steps": 3}],
    "freedave": [{"branches": 4, "row_cost": 0.0}, {"branches": 3, "threshold": 0.5, "row_cost": 0.0}],
    "pipeline": [{"threshold": 0.3}, {"threshold": 0.5, "blocks": 3, "begin": 0.5}],
    "reorder": [{"window": 6, "entropy": 1.5}],
    "jacobi": [
        {"draft_length": 5},
        {"draft_length": 4, "blocks": 3, "spawn_ratio": 0.5, "candidates": 3},
        {"draft_length": 7, "candidates": 16},
    ],
}
CANVAS = [{"cache": "none", "block_length": 8}, {"cache": "dual", "block_length": 12}]
ENGINES: dict[str, EngineCore] = {}


def core_of(family: str) -> EngineCore:
    if family not in ENGINES:
        ENGINES[family] = engine(family)
    return ENGINES[family]


def strategies_of(family: str) -> tuple[str, ...]:
    folder = GOLDEN / {"sdar16": "sdar", "causal": "jacobi_qwen2"}.get(family, family)
    raw, generation = read_config(folder)
    return valid_names(offered(family_from_config(raw, generation, mask_id=None if family == "causal" else 311)))


PAIRS = [(family, strategy) for family in FAMILIES for strategy in strategies_of(family)]


def wanted(family: str, strategy: str) -> list[dict[str, Any]]:
    every = [{"strategy": strategy, **more} for more in LIVELY.get(strategy, [{}])]
    if family in ("llada", "dream"):
        return [{**one, **CANVAS[index % 2]} for index, one in enumerate(every)]
    return every


def requests_of(core: EngineCore, family: str, strategy: str) -> list[AddRequest]:
    found = []
    for index, diffusion in enumerate(wanted(family, strategy)):
        sampling = {"temperature": 0.9, "seed": 5, "top_k": 40} if index % 2 else {}
        for length in (3, 21):
            name = f"{strategy}-{index}-{length}"
            found.append(request(core, name, prompt_of(length), 19, diffusion, **sampling))
    return found


def test_every_strategy_is_tried_somewhere() -> None:
    # `verify`, `learned` and `levenshtein` need a converted model, a filter, LLaDA2.2: they have tests of their own.
    assert {strategy for _, strategy in PAIRS} | {"verify", "learned", "levenshtein"} == set(strategy_classes())


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
def test_a_text_is_the_same_alone_and_among_strangers(family: str, strategy: str) -> None:
    core = core_of(family)
    asked = requests_of(core, family, strategy)
    alone = {}
    for one in asked:
        alone |= run(core, [one])
    strangers = [
        request(core, f"stranger-{name}", prompt_of(9 + 5 * index, seed=index), 12, wanted(family, name)[0])
        for index, name in enumerate(strategies_of(family))
    ]
    crowded = run(core, [strangers[0], *asked, *strangers[1:]], gap=1)
    for key, answer in alone.items():
        assert answer.tokens, "there is a text to compare"
        assert crowded[key].text == answer.text


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
def test_a_text_is_the_same_where_steps_are_planned_ahead(family: str, strategy: str) -> None:
    """As on a GPU: sizes are rounded, rows have room for what may come, and those that have ended run nothing."""
    core = core_of(family)
    asked = requests_of(core, family, strategy)
    alone = run(core, asked)
    ahead = engine(family)
    replays = replaying(ahead)
    ahead.overlapping = True
    found = run(ahead, asked)
    assert {key: answer.text for key, answer in found.items()} == {key: a.text for key, a in alone.items()}
    assert replays.replays
    took, least = (sum(answer.forwards for answer in some.values()) for some in (found, alone))
    assert took <= 1.15 * least + len(asked), "a forward too many for a row now and then, no more"


@pytest.mark.parametrize("strategy", ["threshold", "static", "pipeline"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_no_forward_of_a_canvas_that_is_planned_ahead_is_for_nothing(family: str, strategy: str) -> None:
    """Also where a block ends, and the next one has more to ask about than is left of this one."""
    diffusion = {"strategy": strategy, "cache": "none", "block_length": 8}
    forwards = []
    for overlapping in (False, True):
        core = engine(family)
        core.overlapping = overlapping
        forwards.append(run(core, [request(core, "a", prompt_of(9), 48, diffusion)])["a", 0].forwards)
    assert forwards[0] == forwards[1]


@pytest.mark.parametrize(("family", "strategy"), [pair for pair in PAIRS if pair[0] in ("sdar16", "llada2", "wedlm")])
def test_a_preempted_row_goes_on_where_it_was(family: str, strategy: str) -> None:
    """What a strategy remembers of a row comes back with it."""
    core = core_of(family)
    asked = requests_of(core, family, strategy)
    expected = {key: answer.text for key, answer in run(core, asked).items()}
    before, steps = core.stats().preemptions, 0

    def disturb(core: EngineCore) -> None:
        nonlocal steps
        steps += 1
        if steps % 3 == 1 and core.scheduler.running:
            core.scheduler._preempt(core.scheduler.running[-1])

    answers = run(core, asked, observe=disturb)
    assert {key: answer.text for key, answer in answers.items()} == expected
    assert core.stats().preemptions > before


WAITING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal"}
WAITING |= {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "allclose"}


class NoWaiting(TorchFunctionMode):
    """Refuses what a GPU would have to finish its work for: values on the host, and shapes that follow from values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        assert name not in WAITING, f"{name} waits for the device"
        if name in ("__getitem__", "__setitem__"):
            chosen = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [i for i in chosen if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
            assert not masks, f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
def test_nothing_that_a_strategy_does_waits_for_the_device(
    family: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = core_of(family)
    one, calls = core.runner.strategies[strategy], 0

    def watched(method: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            with NoWaiting():
                return method(*args)

        return call

    for name in ("plan", "bias", "decide"):
        monkeypatch.setattr(one, name, watched(getattr(one, name)))
    for name in ("guard", "advance", "row_view", "cap_span", "concat_spans", "build_batch"):
        monkeypatch.setattr(stages, name, watched(getattr(stages, name)))
    run(core, requests_of(core, family, strategy))
    assert calls > 10


@pytest.mark.parametrize(
    ("family", "strategy"), [pair for pair in PAIRS if pair[0] in ("sdar16", "fast_dllm_v2", "wedlm", "causal")]
)
def test_a_prompt_in_chunks_gives_the_same_text(family: str, strategy: str) -> None:
    """Forwards of chunks alone ask about nothing, whatever the strategy looks at."""
    core = core_of(family)
    diffusion = wanted(family, strategy)[-1]
    whole = run(core, [request(core, "a", prompt_of(150), 10, diffusion)])["a", 0]
    small = engine(family, budget=64)
    chunked = run(small, [request(small, "a", prompt_of(150), 10, diffusion)])["a", 0]
    assert chunked.text == whole.text
    assert chunked.forwards > whole.forwards


@pytest.mark.parametrize("family", ["sdar", "sdar16", "fast_dllm_v2", "llada2"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("order", ["confidence", "sequential"])
def test_freedave_is_static_decoding_in_no_more_forwards(family: str, sampling: dict[str, Any], order: str) -> None:
    core = core_of(family)
    one_by_one = {"strategy": "static", "order": order}
    drafted = {"strategy": "freedave", "order": order, "branches": 5, "row_cost": 0.0}
    for length in (4, 13, 33):
        plain = run(core, [request(core, "a", prompt_of(length), 40, one_by_one, **sampling)])["a", 0]
        fast = run(core, [request(core, "a", prompt_of(length), 40, drafted, **sampling)])["a", 0]
        assert fast.text == plain.text
        assert fast.forwards <= plain.forwards


@pytest.mark.parametrize("family", ["sdar16", "fast_dllm_v2", "llada2"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11}], ids=["greedy", "sampled"])
def test_freedave_with_a_threshold_is_threshold_decoding(family: str, sampling: dict[str, Any]) -> None:
    """Steps that decide several positions pass over branches, and the text stays the same."""
    core = core_of(family)
    drafted = {"strategy": "freedave", "threshold": 0.9, "branches": 8, "row_cost": 0.0}
    plain_forwards = forwards = 0
    for length in (4, 13, 33):
        plain = run(core, [request(core, "a", prompt_of(length), 60, {"threshold": 0.9}, **sampling)])["a", 0]
        fast = run(core, [request(core, "a", prompt_of(length), 60, drafted, **sampling)])["a", 0]
        assert fast.text == plain.text
        plain_forwards, forwards = plain_forwards + plain.forwards, forwards + fast.forwards
    assert forwards < plain_forwards or sampling, "some draft is right"


@pytest.mark.parametrize("family", ["sdar16", "llada", "wedlm"])
def test_the_mask_as_the_best_guess_everywhere_does_not_keep_a_text_from_its_end(family: str) -> None:
    core = engine(family)
    head = core.runner.decoder.head

    def all_mask(hidden: Any) -> Any:
        logits = head(hidden)
        logits[:, core.info.mask_id] = 1e4
        return logits

    core.runner.decoder.head = all_mask
    for strategy in strategies_of(family):
        answer = run(core, [request(core, "a", prompt_of(7), 20, wanted(family, strategy)[0])])["a", 0]
        assert len(answer.tokens) == 20
        assert core.info.mask_id not in answer.tokens


@pytest.mark.parametrize("family", ["sdar16", "llada2", "llada", "dream"])
def test_equal_confidences_are_decided_from_the_left(family: str) -> None:
    core = engine(family)
    head = core.runner.decoder.head

    def equal(hidden: Any) -> Any:
        logits = head(hidden)
        return logits.zero_()

    core.runner.decoder.head = equal
    seen: list[int] = []

    def watch(core: EngineCore) -> None:
        for sequence in core.scheduler.running:
            seen.append(len(sequence.tokens) - sequence.prompt_len)

    more = {"cache": "none"} if family in ("llada", "dream") else {}
    run(core, [request(core, "a", prompt_of(16), 16, {"strategy": "static", **more})], observe=watch)
    assert seen == sorted(seen)
    assert set(range(1, 16)) <= set(seen), "each forward decides the leftmost position"


def test_an_end_of_text_behind_masks_does_not_end_it() -> None:
    """A sure stop id at the far right of a block waits for what stands before it."""
    core = engine("sdar16", stop_ids=(150,))
    head, calls = core.runner.decoder.head, []

    def stop_at_the_end(hidden: Any) -> Any:
        logits = head(hidden)
        logits[:, 150] = -1e4
        calls.append(logits.shape[0])
        if len(calls) == 1:
            logits[-1, 150] = 1e4
        return logits

    core.runner.decoder.head = stop_at_the_end
    answer = run(core, [request(core, "a", prompt_of(16), 40, {"strategy": "threshold", "threshold": 0.99})])["a", 0]
    assert answer.finish == "stop"
    assert len(answer.tokens) == 16, "the whole block was decided first"
    assert len(calls) > 2


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_what_follows_a_text_is_seen(family: str, cache: str) -> None:
    core = core_of(family)
    asked = request(core, "a", prompt_of(9), 12, {"cache": cache, "block_length": 4})
    texts = []
    for suffix in ([], prompt_of(6, seed=3), prompt_of(6, seed=4)):
        answer = run(core, [msgspec.structs.replace(asked, suffix=suffix)])["a", 0]
        assert len(answer.tokens) == 12
        texts.append(tuple(answer.tokens))
    assert len(set(texts)) > 1
