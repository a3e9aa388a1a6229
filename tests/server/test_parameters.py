"""What is accepted is honoured; the rest is 400 and names the parameter."""

from __future__ import annotations

import logging
from typing import Any

import pytest

BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}


def post(server: Any, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    base = BODY if path.endswith("chat/completions") else {"model": "fake", "prompt": "Hello"}
    return server.http.post(path, json={**base, **fields})


def refused(response: Any) -> str | None:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["type"]) == (400, "BadRequestError"), response.text
    return error["param"]


def sent(server: Any, **fields: Any) -> Any:
    response = post(server, **fields)
    assert response.status_code == 200, response.text
    return server.engine.adds[-1]


def test_sampling_reaches_the_engine(server, answering):
    server.engine.script = answering("ok")
    add = sent(
        server,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=-7,
        n=2,
        ignore_eos=True,
        min_tokens=1,
        stop_token_ids=[9, 9, 8],
        max_tokens=33,
        cache_salt="tenant",
    )
    sampling = add.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.seed, sampling.ignore_eos, sampling.min_tokens, sampling.max_tokens) == (-7, True, 1, 33)
    assert sampling.stop_token_ids == (9, 8)
    assert (add.n, add.salt) == (2, "tenant")


def test_defaults(server, answering):
    server.engine.script = answering("ok")
    first, second = sent(server), sent(server, temperature=None, top_k=None, n=None, stop=None, max_tokens=None)
    for add in (first, second):
        assert add.sampling.temperature == 1.0
        assert add.sampling.top_k == 0
        assert add.sampling.max_tokens == 512 - len(add.prompt)
        assert add.decoding.strategy == "threshold"
        assert add.decoding.values["threshold"] == 0.9
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize("off", [-1, 0, 1000])
def test_top_k_off(server, answering, off):
    server.engine.script = answering("ok")
    assert sent(server, top_k=off).sampling.top_k == 0


def test_the_newer_name_of_max_tokens_wins(server, answering):
    server.engine.script = answering("ok")
    assert sent(server, max_completion_tokens=5, max_tokens=7).sampling.max_tokens == 5


def test_diffusion_parameters(server, answering):
    server.engine.script = answering("ok")
    decoding = sent(server, diffusion={"strategy": "static", "denoising_steps": 4}).decoding
    assert decoding.strategy == "static"
    assert decoding.values["denoising_steps"] == 4
    assert sent(server, diffusion={"threshold": 0.5}).decoding.values["threshold"] == 0.5
    assert sent(server, diffusion={}).decoding.strategy == "threshold"


@pytest.mark.parametrize(
    ("diffusion", "param"),
    [
        ({"strategy": "magic"}, "diffusion.strategy"),
        ({"strategy": "jacobi"}, "diffusion.strategy"),
        ({"strategy": 1}, "diffusion.strategy"),
        ({"threshold": 2}, "diffusion.threshold"),
        ({"threshold": True}, "diffusion.threshold"),
        ({"threshold": "0.5"}, "diffusion.threshold"),
        ({"threshold": 10**400}, "diffusion.threshold"),
        ({"treshold": 0.5}, "diffusion.treshold"),
        ({"denoising_steps": 9}, "diffusion.denoising_steps"),
        ([], "diffusion"),
        ("threshold", "diffusion"),
    ],
)
def test_bad_diffusion_parameters(server, diffusion, param):
    assert refused(post(server, diffusion=diffusion)) == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("seed", 2**63),
        ("seed", 10**100),
        ("seed", True),
        ("n", 0),
        ("n", 33),
        ("n", 129),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("max_completion_tokens", 10**30),
        ("stop", [""]),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", "x" * 2000),
        ("stop", {"a": 1}),
        ("min_tokens", -1),
        ("min_tokens", 10_000),
        ("stop_token_ids", [1000]),
        ("stop_token_ids", 5),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),
        ("ignore_eos", "yes"),
        ("model", 5),
        ("messages", "hello"),
        ("messages", []),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"eos_token": "x"}),
        ("continue_final_message", 1),
        ("reasoning_effort", 5),
        ("cache_salt", 5),
    ],
)
def test_bad_values(server, name, value):
    param = refused(post(server, **{name: value}))
    assert param is not None
    assert param.startswith(name)
    assert not server.engine.adds


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, 5]}, "messages[0].content[1]"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ("hello", "messages[0]"),
    ],
)
def test_bad_messages(server, message, param):
    assert refused(post(server, messages=[message])) == param


ASKING = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "top_logprobs": 3,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "repetition_penalty": 1.1,
    "length_penalty": 2,
    "logit_bias": {"5": 1},
    "best_of": 2,
    "use_beam_search": True,
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "structured_outputs": {"regex": "a"},
    "prediction": {"type": "content", "content": "x"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "logits_processors": ["x"],
    "prompt_logprobs": 1,
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "truncate_prompt_tokens": 5,
    "return_tokens_as_token_ids": True,
    "priority": 1,
    "chat_template": "{{ messages }}",
    "documents": [{"text": "x"}],
}


@pytest.mark.parametrize("name", ASKING)
def test_what_is_not_built_is_refused(server, name):
    assert refused(post(server, **{name: ASKING[name]})) == name


@pytest.mark.parametrize("fields", [{"logprobs": 0}, {"logprobs": 5}, {"suffix": "x"}, {"best_of": 3, "n": 2}])
def test_what_completions_do_not_have_is_refused(server, fields):
    assert refused(post(server, "/v1/completions", **fields)) == next(iter(fields))


def test_neutral_values_pass(server, answering):
    server.engine.script = answering("ok")
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "functions": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "best_of": 1,
        "use_beam_search": False,
        "modalities": ["text"],
        "bad_words": [],
        "stop": [],
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
    }
    sent(server, **neutral)
    sent(server, **dict.fromkeys([*neutral, *ASKING]))
    assert post(server, "/v1/completions", suffix="", logprobs=None, best_of=1).status_code == 200


def test_unknown_fields_are_ignored_and_logged_once(server, answering, caplog):
    server.engine.script = answering("ok")
    with caplog.at_level(logging.WARNING, "linocut"):
        for _ in range(3):
            sent(server, some_new_field=1)
    assert len([record for record in caplog.records if "some_new_field" in record.getMessage()]) == 1


def test_unknown_fields_cannot_fill_the_memory():
    from linocut.server.unsupported import UnknownFields

    unknown = UnknownFields(limit=10)
    unknown.note(f"field{i}" for i in range(1000))
    assert len(unknown._seen) == 10


def test_template_arguments(server, answering, ids, tokenizer, monkeypatch):
    from linocut.server.chat_template import ChatTemplate

    source = "{{ messages[0]['content'] }}{% if shout %}!{% endif %}{{ reasoning_effort }}"
    monkeypatch.setattr(tokenizer, "template", ChatTemplate(source, {}))
    server.engine.script = answering("ok")
    add = sent(server, chat_template_kwargs={"shout": True}, reasoning_effort="low")
    assert add.prompt == ids("Hello!low")


def test_a_template_may_refuse(server, tokenizer, monkeypatch):
    from linocut.server.chat_template import ChatTemplate

    monkeypatch.setattr(tokenizer, "template", ChatTemplate("{{ raise_exception('roles must alternate') }}", {}))
    response = post(server)
    assert refused(response) == "messages"
    assert "roles must alternate" in response.json()["error"]["message"]
    monkeypatch.setattr(tokenizer, "template", None)
    assert refused(post(server)) == "messages"


def test_the_models_own_sampling_defaults(tokenizer, answering):
    from fake_engine import FakeEngine, model_info
    from running_server import RunningServer

    info = model_info(
        default_sampling={"temperature": 0.7, "top_k": 20.0, "top_p": 0.8}, default_parameters={"threshold": 0.6}
    )
    with RunningServer(FakeEngine(answering("ok"), info), tokenizer) as server:
        add = sent(server, top_p=0.5)
    assert (add.sampling.temperature, add.sampling.top_k, add.sampling.top_p) == (0.7, 20, 0.5)
    assert add.decoding.values["threshold"] == 0.6
