"""Where a text ends: max_tokens exactly, stop ids at once and never too early, and nothing taken back."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_engines import BLOCK, BLOCK_FAMILIES, FAMILIES, Answer, engine, prompt_of, request, run

from linocut.engine.conformance.trace import Trace, step_traced
from linocut.engine.core import EngineCore

families = pytest.mark.parametrize("family", FAMILIES)
block_families = pytest.mark.parametrize("family", BLOCK_FAMILIES)

# Few commits a forward, many at once, and (where there are blocks) far-right positions before near-left ones.
STRATEGIES: dict[str, list[dict[str, Any]]] = {
    "fast_dllm_v2": [
        {"threshold": 0.3, "sub_block_size": 32},
        {"strategy": "static", "denoising_steps": 8, "sub_block_size": 32},
    ],
    "sdar": [{}, {"strategy": "static", "denoising_steps": 2}],
    "sdar16": [{"threshold": 0.3}, {"strategy": "static", "denoising_steps": 16}],
    "causal": [{}, {"strategy": "jacobi", "draft_length": 9}],
}
PROMPT = {"fast_dllm_v2": 37, "sdar": 22, "sdar16": 22, "causal": 22}


def serve(family: str, max_tokens: int = 70, core: EngineCore | None = None, kind: int = 0, **sampling: Any) -> Answer:
    core = core or engine(family, plain=True)
    message = request(core, "a", prompt_of(PROMPT[family]), max_tokens, STRATEGIES[family][kind], **sampling)
    return run(core, [message])["a", 0]


def first(tokens: list[int], after: int) -> int:
    """The first index from `after` on whose token has not stood in the text before."""
    return next(i for i in range(after, len(tokens)) if tokens[i] not in tokens[:i])


# ---------------------------------------------------------------------- max_tokens


@families
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_max_tokens_is_exact_and_a_shorter_text_is_a_prefix_of_a_longer_one(
    family: str, sampling: dict[str, Any]
) -> None:
    core = engine(family, max_running=70, check_invariants=False)
    requests = [
        request(core, str(n), prompt_of(PROMPT[family]), n, STRATEGIES[family][n % 2 and not sampling], **sampling)
        for n in range(1, 71)
    ]
    answers = run(core, requests)
    for n in range(1, 71):
        answer = answers[str(n), 0]
        longest = answers[str(70 if sampling or n % 2 == 0 else 69), 0]
        assert (len(answer.tokens), answer.finish) == (n, "length")
        assert answer.tokens == longest.tokens[:n]


@block_families
def test_a_banned_stop_id_does_not_make_the_text_depend_on_max_tokens(family: str) -> None:
    """ignore_eos bans the family's stop ids at every position, also those behind the limit that a last block decides
    in passing: its other positions see them."""
    free = serve(family, kind=1)
    # The ids that the free text likes most are the ones whose ban matters.
    stops = tuple(sorted(set(free.tokens), key=free.tokens.count)[-12:])
    core = engine(family, plain=True, stop_ids=stops, max_running=70, check_invariants=False)
    requests = [
        request(core, str(n), prompt_of(PROMPT[family]), n, STRATEGIES[family][1], ignore_eos=True)
        for n in range(1, 71)
    ]
    answers = run(core, requests)
    longest = answers["70", 0].tokens
    assert {n: answers[str(n), 0].tokens for n in range(1, 71)} == {n: longest[:n] for n in range(1, 71)}


# ---------------------------------------------------------------------- stop ids


@families
@pytest.mark.parametrize("kind", [0, 1])
def test_a_stop_id_ends_the_text_and_is_its_last_token(family: str, kind: int) -> None:
    core = engine(family, plain=True)
    free = serve(family, core=core, kind=kind)
    assert (free.finish, free.stop_token) == ("length", None)
    places = sorted({first(free.tokens, after) for after in (0, 1, 2, 7, 15, 30, 40)})
    prompt, diffusion = prompt_of(PROMPT[family]), STRATEGIES[family][kind]
    requests = [request(core, str(at), prompt, 70, diffusion, stop_token_ids=(free.tokens[at], 319)) for at in places]
    for (name, _), answer in run(core, requests).items():
        at = int(name)
        assert answer.text == (free.tokens[: at + 1], "stop", free.tokens[at])
        assert answer.forwards <= free.forwards


@families
def test_the_familys_stop_ids_do_so_for_every_request(family: str) -> None:
    free = serve(family)
    at = first(free.tokens, 7)
    answer = serve(family, core=engine(family, plain=True, stop_ids=(free.tokens[at], 319)))
    assert answer.text == (free.tokens[: at + 1], "stop", free.tokens[at])


@families
def test_the_stop_ids_in_a_prompt_end_nothing(family: str) -> None:
    free = serve(family)
    stops = tuple(set(prompt_of(PROMPT[family])) - set(free.tokens))
    assert serve(family, stop_token_ids=stops).text == free.text


@families
def test_a_stop_id_right_at_max_tokens_is_a_stop_and_one_behind_it_is_not(family: str) -> None:
    free = serve(family)
    at = first(free.tokens, 20)
    stop = (free.tokens[at],)
    assert serve(family, at + 1, stop_token_ids=stop).text == (free.tokens[: at + 1], "stop", stop[0])
    assert serve(family, at, stop_token_ids=stop).text == (free.tokens[:at], "length", None)


@block_families
@pytest.mark.parametrize("numerics", ["fast", "reference"])
def test_a_stop_id_with_masks_before_it_does_not_end_the_text_early(family: str, numerics: str) -> None:
    """A confident end of text at the far right of a block: everything before it is still denoised."""
    core = engine(family, numerics=numerics)
    free = traced(core, family)
    text = {position: token for step in free.steps for position, token in step.items()}
    waiting = [
        (index, position)
        for index, step in enumerate(free.steps)
        for position in step
        if position < free.prompt_len + 64
        and any(earlier < position for later in free.steps[index + 1 :] for earlier in later)
        and text[position] not in [text[p] for p in text if p < position]
    ]
    assert waiting, "some position is decided before one to its left"
    for index, position in waiting[:: max(len(waiting) // 4, 1)]:
        stopped = traced(core, family, stop_token_ids=(text[position],))
        end = position - stopped.prompt_len + 1
        assert stopped.tokens == free.tokens[:end]
        assert stopped.finish == "stop"
        assert len(stopped.steps) > index + 1, "it ended although masks stood before the stop id"
        if numerics == "fast":
            last = max(i for i, step in enumerate(free.steps) if any(p <= position for p in step))
            assert len(stopped.steps) == last + 1, "it went on although no mask stood before the stop id"


def traced(core: EngineCore, family: str, **sampling: Any) -> Trace:
    message = request(core, "a", prompt_of(PROMPT[family]), 64, STRATEGIES[family][1], **sampling)
    core.add(message)
    trace = Trace(len(message.prompt))
    while trace.finish is None:
        step_traced(core, "a", trace)
    return trace


@pytest.mark.parametrize("numerics", ["fast", "reference"])
@pytest.mark.parametrize("prompt", [32, 37, 64])
def test_a_stop_id_that_arrives_as_the_seed_of_a_block_ends_the_text(numerics: str, prompt: int) -> None:
    """Shifted families: the clean forward of a block (or of a prompt that ends with one) decides the next position."""
    core = engine("fast_dllm_v2", numerics=numerics)
    ids = prompt_of(prompt, seed=5)
    free = run(core, [request(core, "a", ids, 100)])["a", 0].tokens
    for seed in range(-prompt % 32, 97, 32):
        if free[seed] in free[:seed]:
            continue
        answer = run(core, [request(core, "a", ids, 100, stop_token_ids=(free[seed],))])["a", 0]
        assert answer.text == (free[: seed + 1], "stop", free[seed])
        assert answer.chunks[-1] == [free[seed]], "it came alone, from the clean forward"
        break
    else:
        pytest.fail("no seed is new to the text")


# ---------------------------------------------------------------------- min_tokens, ignore_eos


@families
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_stop_id_is_chosen_below_min_tokens(family: str, temperature: float) -> None:
    stops = tuple(range(0, 160))
    core = engine(family, stop_ids=stops[:80], plain=True)
    requests = [
        request(
            core,
            str(minimum),
            prompt_of(PROMPT[family]),
            60,
            STRATEGIES[family][minimum % 2],
            stop_token_ids=stops[80:],
            min_tokens=minimum,
            temperature=temperature,
            seed=minimum,
        )
        for minimum in (0, 1, 2, 9, 17, 40, 60)
    ]
    answers = run(core, requests)
    for (name, _), answer in answers.items():
        assert not set(answer.tokens[: int(name)]) & set(stops)
        assert set(answer.tokens[:-1]).isdisjoint(stops), "a stop id ends the text"
        assert (answer.finish == "stop") == (answer.tokens[-1] in stops)
    assert [answers[name, 0].finish for name in ("0", "60")] == ["stop", "length"]


@families
def test_min_tokens_changes_nothing_where_no_stop_id_would_be_chosen(family: str) -> None:
    free = serve(family)
    unused = tuple(set(range(300)) - set(free.tokens))[:3]
    assert serve(family, stop_token_ids=unused, min_tokens=50).tokens == free.tokens


@families
def test_ignore_eos_bans_the_familys_stop_ids_and_keeps_the_requests_own(family: str) -> None:
    stops = tuple(range(0, 300, 2))
    core = engine(family, plain=True, stop_ids=stops)
    ended = run(core, [request(core, "a", prompt_of(30), 50)])["a", 0]
    assert ended.finish == "stop"
    ignoring = run(core, [request(core, "a", prompt_of(30), 50, ignore_eos=True)])["a", 0]
    assert (len(ignoring.tokens), ignoring.finish) == (50, "length")
    assert set(ignoring.tokens).isdisjoint(stops)
    own = ignoring.tokens[first(ignoring.tokens, 5)]
    both = run(core, [request(core, "a", prompt_of(30), 50, ignore_eos=True, stop_token_ids=(own,))])["a", 0]
    assert both.text == (ignoring.tokens[: ignoring.tokens.index(own) + 1], "stop", own)


def test_rows_with_many_and_with_few_stop_ids_share_a_batch() -> None:
    core = engine("sdar")
    free = run(core, [request(core, "a", prompt_of(20), 40)])["a", 0]
    at = first(free.tokens, 12)
    stops = {"none": (), "one": (free.tokens[at],), "many": (*range(300, 311), free.tokens[at]), "zero": (0,)}
    requests = [request(core, name, prompt_of(20), 40, stop_token_ids=ids, min_tokens=1) for name, ids in stops.items()]
    answers = run(core, requests, gap=1)
    lengths = {name: len(answer.tokens) for (name, _), answer in answers.items()}
    assert lengths == {"none": 40, "one": at + 1, "many": at + 1, "zero": 40}


# ---------------------------------------------------------------------- limits of the engine


@families
def test_the_longest_request_the_engine_accepts_is_served_by_the_least_pool(family: str) -> None:
    core = engine(family, max_model_len=96, pages=-(-(96 + BLOCK[family]) // 16), plain=True)
    for length in (1, 32, 63, 95):
        answer = run(core, [request(core, "a", prompt_of(length), 96 - length)])["a", 0]
        assert (len(answer.tokens), answer.finish) == (96 - length, "length")
    assert core.stats().preemptions == 0


@families
def test_text_is_streamed_as_it_becomes_certain(family: str) -> None:
    """Every chunk holds at least one token: nothing is sent for steps that only decided positions behind a mask."""
    answer = serve(family, kind=1)
    assert all(answer.chunks)
    assert len(answer.chunks) > 4
    assert answer.forwards >= len(answer.chunks)
    assert answer.positions >= len(answer.tokens)
