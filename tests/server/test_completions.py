"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

import openai
import pytest

TEXT = "The end of the story."


def complete(server: Any, **fields: Any) -> Any:
    return server.openai.completions.create(**{"model": "fake", "prompt": "Hello", **fields})


def test_answers_with_text(server, answering, ids):
    server.engine.script = answering(TEXT)
    answer = complete(server, max_tokens=100)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert server.engine.adds[0].prompt == ids("Hello")


@pytest.mark.parametrize(("fields", "expected"), [({}, 16), ({"max_tokens": None}, 511), ({"max_tokens": 7}, 7)])
def test_max_tokens_defaults_to_openais_16_and_null_fills_the_context(server, answering, fields, expected):
    server.engine.script = answering(TEXT)
    complete(server, prompt=[5], **fields)
    assert server.engine.adds[0].sampling.max_tokens == expected


def test_stream(server, answering):
    server.engine.script = answering(TEXT, chunk=2, after=0.005)
    chunks = list(complete(server, max_tokens=100, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.prompt_tokens > 0


def test_token_ids_as_prompt(server, answering):
    server.engine.script = answering(TEXT)
    complete(server, prompt=[7, 2, 999])  # the mask's id is fine as an id
    assert server.engine.adds[0].prompt == [7, 2, 999]


def test_several_prompts_times_n(server, ids):
    from fake_engine import say

    server.engine.script = lambda request, choice: say(ids(f"{request.prompt[0]}/{choice}"))(request, choice)
    answer = complete(server, prompt=[[5], [6], [7]], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(
        enumerate(["5/0", "5/1", "6/0", "6/1", "7/0", "7/1"])
    )
    assert answer.usage.prompt_tokens == 3
    complete(server, prompt=["one", "two"])
    assert [add.prompt for add in server.engine.adds[-2:]] == [ids("one"), ids("two")]


def test_echo(server, answering, ids):
    server.engine.script = answering(TEXT)
    assert complete(server, echo=True, max_tokens=100).choices[0].text == "Hello" + TEXT
    assert complete(server, prompt=ids("Hi there"), echo=True, max_tokens=100).choices[0].text == "Hi there" + TEXT
    chunks = list(complete(server, echo=True, max_tokens=100, stream=True, n=2))
    for index in (0, 1):
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index)
        assert text == "Hello" + TEXT


def test_control_tokens_in_a_prompt_are_tokens_but_not_the_mask(server, answering):
    server.engine.script = answering(TEXT)
    complete(server, prompt="<|im_start|>user\n<|mask|>")
    prompt = server.engine.adds[0].prompt
    assert prompt[0] == 0
    assert 2 not in prompt
    assert len(prompt) > 5


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ("", "prompt"),
        ([[]], "prompt[0]"),
        ([1000], "prompt"),
        ([-1], "prompt[0]"),
        ([1, "a"], "prompt"),
        (["a", 1], "prompt[1]"),
        ([[1], "", [2]], "prompt[1]"),
        ([[1], [2000]], "prompt[1]"),
        ({"a": 1}, "prompt"),
        ([True], "prompt[0]"),
        ([1.5], "prompt[0]"),
        (["x"] * 33, "prompt"),
    ],
)
def test_bad_prompts(server, prompt, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, prompt=prompt)
    assert caught.value.param == param
    assert not server.engine.adds


def test_the_context_has_an_end(server, answering):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, prompt=[5] * 500, max_tokens=13)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    assert "maximum context length is 512 tokens" in caught.value.message
    assert "requested 513 tokens (500 in the prompt, 13 in the completion)" in caught.value.message
    server.engine.script = answering("ok")
    complete(server, prompt=[5] * 500)  # the default makes do with what is left
    assert server.engine.adds[0].sampling.max_tokens == 12
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, prompt=[5] * 512)
    assert caught.value.code == "context_length_exceeded"
