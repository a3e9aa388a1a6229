"""Models, tokens, probes, metrics, keys."""

from __future__ import annotations

import time

import openai
import pytest
from fake_engine import FakeEngine, say
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer
from test_chat import USER, chat

from linocut.engine.messages import EngineStats


def test_models(server):
    assert [model.id for model in server.openai.models.list()] == ["fake", "alias"]
    model = server.openai.models.retrieve("alias").to_dict()
    assert model["max_model_len"] == 512
    assert model["diffusion"]["strategies"][0] == "threshold"
    assert "static" in model["diffusion"]["strategies"]
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.models.retrieve("org/none")
    assert caught.value.code == "model_not_found"


def test_tokenize_and_detokenize(server, ids):
    answer = server.http.post("/tokenize", json={"prompt": "Hello 日本", "return_token_strs": True}).json()
    assert answer["tokens"] == ids("Hello 日本")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hello 日本"}
    body = {"model": "fake", "messages": USER, "add_generation_prompt": False}
    chat_ids = server.http.post("/tokenize", json=body).json()
    assert chat_ids["tokens"] == ids("<|im_start|>user\nHello<|im_end|>\n")
    assert chat_ids["token_strs"] is None
    text = server.http.post("/detokenize", json={"tokens": chat_ids["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"prompt": "a", "model": "none"}, 404),
        ("/detokenize", {"tokens": [1000]}, 400),
        ("/detokenize", {"tokens": [True]}, 400),
        ("/detokenize", {"tokens": "abc"}, 400),
        ("/detokenize", {}, 400),
    ],
)
def test_bad_token_requests(server, path, body, status):
    assert server.http.post(path, json=body).status_code == status


def test_probes(server):
    for path in ("/health", "/ready"):
        assert server.http.get(path).status_code == 200
        assert server.http.head(path).status_code == 200
    assert server.http.get("/version").json()["version"]


def samples(server) -> dict[str, float]:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    return {
        sample.name
        + "".join(
            f",{k}={v}" for k, v in sorted(sample.labels.items()) if k not in ("engine", "model_name")
        ): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics(tokenizer, ids):
    stats = EngineStats(
        running=3, waiting=2, pages_total=64, pages_free=16, pages_cached=16, committed_tokens=1234, step_seconds=1.5
    )
    engine = FakeEngine(say(ids("Hello there"), chunk=1, after=0.01), stats=stats)
    with RunningServer(engine, tokenizer) as server:
        chat(server)
        server.http.post("/v1/chat/completions", json={"messages": 5})
        found = samples(server)
    assert found["linocut_num_requests_running"] == 3
    assert found["linocut_num_requests_waiting"] == 2
    assert found["linocut_kv_cache_usage_perc"] == 0.5
    assert found["linocut_positions_committed_total"] == 1234
    assert found["linocut_step_seconds_total"] == 1.5
    assert found["linocut_request_success_total,finished_reason=stop"] == 1
    assert found["linocut_generation_tokens_total"] == len(ids("Hello there")) + 1
    assert found["linocut_time_to_first_token_seconds_count"] == 1
    assert found["linocut_inter_token_latency_seconds_count"] == len(ids("Hello there"))
    assert found["linocut_tokens_per_forward_count"] == 1
    path = "endpoint=/v1/chat/completions,method=POST"
    assert found[f"linocut_http_requests_total,{path},status=200"] == 1
    assert found[f"linocut_http_requests_total,{path},status=400"] == 1


def test_keys(tokenizer, answering):
    with RunningServer(FakeEngine(answering("ok")), tokenizer, api_keys=("first", "second")) as server:
        assert chat(server).choices[0].message.content == "ok"
        body = {"messages": USER}
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}, {"Authorization": "Bearer"}):
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/nowhere"):
                response = server.http.post(path, json=body, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert "x-request-id" in response.headers
            assert server.http.get("/v1/models", headers=headers).status_code == 401
        headers = {"Authorization": "bearer second"}
        assert server.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert server.http.get(path).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_a_request_is_logged_once_and_without_its_text(server, answering, caplog):
    server.engine.script = answering("an answer")
    with caplog.at_level("INFO", "linocut"):
        headers = {"X-Request-Id": "my-id"}
        body = {"messages": [{"role": "user", "content": "private words"}]}
        assert server.http.post("/v1/chat/completions", json=body, headers=headers).headers["x-request-id"] == "my-id"
        deadline = time.monotonic() + 5  # the line is written after the answer
        while "my-id" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)  # for another one
    lines = [record.getMessage() for record in caplog.records if "my-id" in record.getMessage()]
    assert len(lines) == 1
    assert "status=200" in lines[0]
    assert "finish=stop" in lines[0]
    assert "private" not in caplog.text


def test_without_a_tokenizer_token_ids_are_served():
    with RunningServer(FakeEngine(say([5, 6, 7])), None) as server:
        answer = server.openai.completions.create(model="fake", prompt=[8, 9]).to_dict()
        assert answer["choices"][0]["token_ids"] == [5, 6, 7, 1]
        assert answer["choices"][0]["text"] == ""
        chunks = list(server.openai.completions.create(model="fake", prompt=[8, 9], stream=True))
        assert [token for chunk in chunks for token in chunk.choices[0].to_dict()["token_ids"]] == [5, 6, 7, 1]
        for call in (
            lambda: chat(server),
            lambda: server.openai.completions.create(model="fake", prompt="text"),
            lambda: server.openai.completions.create(model="fake", prompt=[1], stop="x"),
            lambda: server.openai.completions.create(model="fake", prompt=[1], echo=True),
        ):
            with pytest.raises(openai.BadRequestError, match="no tokenizer"):
                call()
