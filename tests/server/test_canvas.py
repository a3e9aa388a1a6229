"""A server in front of a canvas model: completions, also of nothing, and no conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, model_info, say
from running_server import RunningServer
from small_tokenizer import write_folder

from linocut.engine.decoding.registry import offered
from linocut.engine.family import FamilyTraits
from linocut.server.announcement import announce
from linocut.server.tokenizer import Tokenizer, load_tokenizer

TRAITS = FamilyTraits("canvas", "canvas", "own", 64, 64, 2, (1,))


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    info = model_info(
        context="canvas",
        block_size=64,
        max_model_len=63,
        strategy_table=offered(TRAITS).strategy_table,
        default_strategy="ancestral",
        default_parameters={"steps": 16},
        pages=0,
    )
    # This tokenizer has a chat template all the same.
    with RunningServer(FakeEngine(say([300, 301, 302]), info), tokenizer) as running:
        yield running


@pytest.mark.parametrize("prompt", ["", [], [[], ""]], ids=str)
def test_an_empty_prompt_is_completed(server: Any, prompt: Any) -> None:
    server.engine.adds.clear()
    answer = server.http.post("/v1/completions", json={"model": "fake", "prompt": prompt, "max_tokens": 20})
    assert answer.status_code == 200, answer.text
    assert [add.prompt for add in server.engine.adds] == [[]] * len(answer.json()["choices"])
    assert answer.json()["usage"]["prompt_tokens"] == 0
    assert answer.json()["usage"]["completion_tokens"] == 4 * len(answer.json()["choices"])


def test_null_max_tokens_fills_the_canvas(server: Any) -> None:
    server.http.post("/v1/completions", json={"model": "fake", "prompt": "", "max_tokens": None})
    assert server.engine.adds[-1].sampling.max_tokens == 63


def test_steps_reach_the_engine(server: Any) -> None:
    body = {"model": "fake", "prompt": "The", "max_tokens": 4, "diffusion": {"steps": 8}}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    assert server.engine.adds[-1].decoding.values == {"steps": 8}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"diffusion": {"strategy": "guided"}}, "diffusion.strategy"),
        ("completions", {"diffusion": {"steps": 0}}, "diffusion.steps"),
        ("completions", {"max_tokens": 64}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}, "messages"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(server: Any, path: str, fields: dict[str, Any], param: str) -> None:
    base = {"model": "fake"} if path.startswith("chat") else {"model": "fake", "prompt": ""}
    answer = server.http.post(f"/v1/{path}", json={**base, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_chat_is_refused_with_a_reason(server: Any) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}
    message = server.http.post("/v1/chat/completions", json=body).json()["error"]["message"]
    assert "not trained on conversations" in message
    assert "/v1/completions" in message


def test_the_line_to_try_is_a_completion(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    announce(server.service, server.url)
    assert "/v1/completions" in capsys.readouterr().err


def test_other_models_need_a_prompt(tmp_path: Path) -> None:
    with RunningServer(FakeEngine(), load_tokenizer(write_folder(tmp_path))) as running:
        for prompt in ("", []):
            answer = running.http.post("/v1/completions", json={"model": "fake", "prompt": prompt})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
