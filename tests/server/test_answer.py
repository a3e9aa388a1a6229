"""A choice's text, tokens and end do not depend on how many tokens a step commits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import byte_level_bpe
from test_detokenizer import Decoder

from linocut.engine.messages import ChoiceOutput
from linocut.server.answer import Answer, AnswerRules
from linocut.server.detokenizer import Detokenizer

BACKEND = byte_level_bpe()
TEXT = "The quick 日本語 fox 🦊 jumps over the 🎉 lazy dog."


def run(ids: list[int], rules: AnswerRules, seed: int | None, stop_token: int | None = None, skip: bool = True):
    """(text, token ids, tokens counted, finish reason, stop reason) of an answer cut into random steps."""
    answer = Answer(0, Detokenizer(Decoder(BACKEND), skip), rules)
    tokens = [*ids, stop_token] if stop_token is not None else ids
    rng, start, text, seen = random.Random(seed), 0, "", []
    while True:
        size = len(tokens) if seed is None else rng.choice((1, 2, 3, 7))
        piece, start = tokens[start : start + size], start + size
        last = start >= len(tokens)
        finish = None if not last else "stop" if stop_token is not None else "length"
        output = ChoiceOutput(
            request_id="r", choice=0, token_ids=piece, finish_reason=finish, stop_token=stop_token if last else None
        )
        delta = answer.push(output)
        text += delta.text
        seen += delta.token_ids
        if delta.finish_reason is not None:
            return text, seen, answer.tokens, delta.finish_reason, delta.stop_reason


@given(
    st.lists(st.text("The quick 日本語🦊o", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 20),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=200)
def test_any_steps_give_the_same_answer(stops, min_tokens, include, seed):
    ids = BACKEND.encode(TEXT).ids
    rules = AnswerRules(stops=tuple(stops), min_tokens=min_tokens, include_stop=include)
    assert run(ids, rules, seed, 1) == run(ids, rules, None, 1)


def test_text_is_cut_before_the_stop_string():
    ids = BACKEND.encode(TEXT).ids
    text, seen, tokens, finish, reason = run(ids, AnswerRules(stops=("ox 🦊 j",)), 3)
    assert text == "The quick 日本語 f"
    assert (finish, reason) == ("stop", "ox 🦊 j")
    assert tokens == len(seen) < len(ids)
    assert BACKEND.decode(seen).startswith("The quick 日本語 fox 🦊 j")
    included = run(ids, AnswerRules(stops=("ox 🦊 j",), include_stop=True), 3)
    assert included[0] == "The quick 日本語 fox 🦊 j"


def test_a_stop_string_at_the_very_end():
    ids = BACKEND.encode(TEXT).ids
    text, seen, _, finish, reason = run(ids, AnswerRules(stops=("dog.",)), 1)
    assert (text, seen, finish, reason) == (TEXT[:-4], ids, "stop", "dog.")


def test_a_beginning_that_never_completes_is_kept():
    ids = BACKEND.encode(TEXT).ids
    assert run(ids, AnswerRules(stops=("dog.!",)), 1)[0] == TEXT


def test_stop_strings_wait_for_min_tokens():
    ids = BACKEND.encode("the the the the").ids
    text, seen, *_ = run(ids, AnswerRules(stops=("the",), min_tokens=2), 1)
    assert len(seen) > 2
    assert text.startswith("the")


@pytest.mark.parametrize("own", [True, False])
def test_the_stop_token_counts_but_is_no_text(own):
    ids = BACKEND.encode(TEXT).ids
    rules = AnswerRules(stop_token_ids=frozenset({1} if own else ()))
    text, seen, tokens, finish, reason = run(ids, rules, 5, stop_token=1, skip=False)
    assert (text, seen, tokens, finish) == (TEXT, [*ids, 1], len(ids) + 1, "stop")
    assert reason == (1 if own else None)
    shown = run(ids, AnswerRules(include_stop=True), 5, stop_token=1, skip=False)
    assert shown[0] == TEXT + "<|im_end|>"
