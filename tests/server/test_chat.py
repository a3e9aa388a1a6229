"""POST /v1/chat/completions, with the client that most users have."""

from __future__ import annotations

import json
from typing import Any

import pytest

TEXT = "The quick brown fox 日本語 🦊🎉 jumps."
USER = [{"role": "user", "content": "Hello"}]


def chat(server: Any, **fields: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": "fake", "messages": USER, **fields})


def events(response: Any) -> list[Any]:
    """The data of a stream's events, [DONE] included."""
    lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_answers_with_text_and_usage(server, answering, ids):
    server.engine.script = answering(TEXT)
    answer = chat(server)
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    tokens = len(ids(TEXT)) + 1
    prompt = server.engine.adds[0].prompt
    assert prompt == ids("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    forwards = -(-tokens // 3)
    assert answer.usage.to_dict() == {
        "prompt_tokens": len(prompt),
        "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
        "prompt_tokens_details": {"cached_tokens": 4},
        "diffusion": {
            "forwards": forwards,
            "tokens_per_forward": round(tokens / forwards, 4),
            "positions": forwards * 8,
        },
    }


def test_length_is_a_finish_reason(server, answering):
    server.engine.script = answering(TEXT)
    answer = chat(server, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_stream_adds_up_to_the_same_text(server, answering, chunk):
    server.engine.script = answering(TEXT, chunk)
    chunks = list(chat(server, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_ends_with_usage_if_asked(server, answering):
    server.engine.script = answering(TEXT)
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].usage.to_dict()["diffusion"]["forwards"] > 0


def test_usage_on_every_chunk_if_asked(server, answering):
    server.engine.script = answering(TEXT, after=0.02)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(server, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_stream_on_the_wire(server, answering):
    server.engine.script = answering("Hello")
    body = {"model": "fake", "messages": USER, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        data = events(response)
    assert data[-1] == "[DONE]"
    assert data[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert data[-2]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }


def test_silence_is_filled_with_comments(server, answering):
    server.engine.script = answering("Hello", after=0.5)
    body = {"model": "fake", "messages": USER, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = list(response.iter_lines())
    assert 2 <= lines.count(": keep-alive") <= 6


def test_choices_are_kept_apart(server, ids):
    from fake_engine import IM_END, Step

    def script(request, choice):
        for token in ids(f"answer {choice} {TEXT}"):
            yield Step([token])
        yield Step([IM_END], "stop", IM_END)

    server.engine.script = script
    answer = chat(server, n=3)
    assert [choice.message.content for choice in answer.choices] == [f"answer {i} {TEXT}" for i in range(3)]
    texts = ["", "", ""]
    roles = []
    for chunk in chat(server, n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert texts == [f"answer {i} {TEXT}" for i in range(3)]
    assert sorted(roles) == [0, 1, 2]
    assert server.engine.adds[0].n == 3


def test_parts_of_text_are_joined(server, answering, ids):
    server.engine.script = answering("ok")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(server, messages=[{"role": "user", "content": parts}])
    assert server.engine.adds[0].prompt == ids("<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n")


def test_roles_of_openai_are_known(server, answering, ids):
    server.engine.script = answering("ok")
    messages = [
        {"role": "developer", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "b", "tool_call_id": "x"},
    ]
    chat(server, messages=messages)
    expected = "<|im_start|>system\na<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nb<|im_end|>\n"
    assert server.engine.adds[0].prompt == ids(expected + "<|im_start|>assistant\n")


def test_the_final_message_can_be_continued(server, answering, ids):
    server.engine.script = answering("ok")
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    chat(server, messages=messages, extra_body={"continue_final_message": True})
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nWell, "
    assert server.engine.adds[0].prompt == ids(expected)


def test_generation_prompt_can_be_left_out(server, answering, ids):
    server.engine.script = answering("ok")
    chat(server, extra_body={"add_generation_prompt": False})
    assert server.engine.adds[0].prompt == ids("<|im_start|>user\nHello<|im_end|>\n")


def test_token_ids_on_request(server, answering, ids):
    server.engine.script = answering(TEXT)
    answer = chat(server, extra_body={"return_token_ids": True}).to_dict()
    assert answer["choices"][0]["token_ids"] == [*ids(TEXT), 1]
    assert answer["prompt_token_ids"] == server.engine.adds[0].prompt
    chunks = [chunk.to_dict() for chunk in chat(server, stream=True, extra_body={"return_token_ids": True})]
    assert chunks[0]["prompt_token_ids"] == server.engine.adds[0].prompt
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == [*ids(TEXT), 1]


def test_an_alias_is_answered_under_its_own_name(server, answering):
    server.engine.script = answering("ok")
    assert chat(server, model="alias").model == "alias"
