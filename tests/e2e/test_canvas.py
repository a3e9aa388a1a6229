"""A canvas model behind the real server: random weights of the published format, the real openai client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from plain_canvas import END, SIZES, PlainSampler, write_canvas

from .conftest import Server, start, stop

LENGTH = SIZES["length"]
GUIDED = {"guidance_scale_start": 30.0, "guidance_scale_end": 40.0, "num_candidates": 4, "rerank_steps_ratio": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canvas")


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainSampler:
    return PlainSampler(*write_canvas(folder / "model"), LENGTH)


@pytest.fixture(scope="module")
def server(folder: Path, plain: PlainSampler) -> Iterator[Server]:
    running = start([str(folder / "model"), "--dtype", "float32", "--device", "cpu"], folder / "log")
    yield running
    assert stop(running) == 0


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def text_of(canvas: list[int]) -> list[int]:
    """What an answer has of a canvas that begins with END and a prompt of two."""
    tokens = canvas[3:]
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.parametrize("strategy", ["ancestral", "guided"])
def test_a_completion_is_the_plain_samplers(client: openai.OpenAI, plain: PlainSampler, strategy: str) -> None:
    answer = client.completions.create(
        model="model",
        prompt=[65, 66],
        max_tokens=LENGTH - 3,
        seed=5,
        n=2,
        extra_body={"return_token_ids": True, "diffusion": {"strategy": strategy, "steps": 6}},
    )
    for choice in answer.choices:
        canvas = plain.sample([END, 65, 66], 5, choice.index, 6, **(GUIDED if strategy == "guided" else {}))
        assert choice.token_ids == text_of(canvas)
        assert choice.finish_reason == ("stop" if END in canvas[3:] else "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.diffusion["forwards"] <= 12


def test_a_text_from_nothing(client: openai.OpenAI) -> None:
    def write(seed: int) -> str:
        made = client.completions.create(
            model="model", prompt="", max_tokens=8, seed=seed, extra_body={"ignore_eos": True}
        )
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (0, 8)
        return made.choices[0].text

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    fields = {"model": "model", "prompt": "The", "max_tokens": 30, "seed": 3, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**fields).choices[0].text
    with client.completions.create(**fields, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == whole
    assert chunks[-1].finish_reason == "length"


def test_texts_do_not_depend_on_their_neighbours(client: openai.OpenAI) -> None:
    def complete(number: int) -> str:
        strategy = ("ancestral", "guided")[number % 2]
        diffusion = {"strategy": strategy, "steps": 2 + number}
        answer = client.completions.create(
            model="model", prompt=f"{number} is", max_tokens=20, seed=number, extra_body={"diffusion": diffusion}
        )
        return answer.choices[0].text

    alone = [complete(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(complete, range(6))) == alone


def test_it_has_no_conversations(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="model", messages=[{"role": "user", "content": "Hello"}])
    assert refused.value.param == "messages"
    assert "not trained on conversations" in str(refused.value)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"diffusion": {"steps": 0}}, "diffusion.steps"),
        ({"diffusion": {"strategy": "threshold"}}, "diffusion.strategy"),
        ({"diffusion": {"strategy": "ancestral", "num_candidates": 2}}, "diffusion.num_candidates"),
        ({"logprobs": 1}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client: openai.OpenAI, extra: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="model", prompt="The", extra_body=extra)
    assert refused.value.param == param


def test_its_card_and_metrics(client: openai.OpenAI, server: Server) -> None:
    card = httpx.get(f"{server.url}/v1/models/model", timeout=30).json()
    assert card["max_model_len"] == LENGTH - 1
    assert card["diffusion"]["strategies"] == ["guided", "ancestral"]
    server.wait_for("linocut_num_requests_running == 0")
    assert server.metric("linocut_forwards_total") > 0
