"""The real openai client against the real server and the embedded model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from .conftest import Server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(embedded: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_question_is_answered(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=32)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8  # the words, the full stop, the end of the turn
    forwards = answer.usage.diffusion["forwards"]
    assert 2 <= forwards < 8
    assert answer.usage.diffusion == {
        "forwards": forwards,
        "tokens_per_forward": round(8 / forwards, 4),
        "positions": answer.usage.diffusion["positions"],
    }


def test_a_stream_is_the_same_text(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=32)
    with client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_drafts_and_verifies_gives_the_autoregressive_text(
    client: openai.OpenAI, model: str, temperature: float
) -> None:
    texts = {
        strategy: client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Count from one to five."}],
            temperature=temperature,
            seed=11,
            max_tokens=24,
            extra_body={"diffusion": {"strategy": strategy}},
        ).choices[0]
        for strategy in ("autoregressive", "jacobi", "verify", None)
    }
    assert len({text.message.content for text in texts.values()}) == 1


def test_blocks_are_decoded_too(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        extra_body={"diffusion": {"strategy": "threshold", "threshold": 0.7}},
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.diffusion["tokens_per_forward"] > 1


def test_a_seed_repeats_a_sample_and_another_one_does_not(client: openai.OpenAI, model: str) -> None:
    def sample(seed: int) -> str:
        story = client.completions.create(
            model=model, prompt="Once upon a time", max_tokens=16, temperature=1, seed=seed
        )
        return story.choices[0].text

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


def test_choices_are_samples_of_one_prompt(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=12, temperature=1, seed=1, n=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 36


def test_max_tokens_is_exact(client: openai.OpenAI, model: str) -> None:
    for count in (1, 7):
        answer = client.completions.create(
            model=model, prompt="The sea", max_tokens=count, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == count
        assert answer.choices[0].finish_reason == "length"


def test_a_stop_string_cuts_the_text(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=32, stop=[" is Par"]
    )
    assert answer.choices[0].message.content == "The capital of France"
    assert answer.choices[0].finish_reason == "stop"


def test_prompts_as_ids_and_lists_and_echo(client: openai.OpenAI, embedded: Server, model: str) -> None:
    ids = httpx.post(f"{embedded.url}/tokenize", json={"model": model, "prompt": "The sea"}, timeout=30).json()[
        "tokens"
    ]
    answer = client.completions.create(model=model, prompt=[ids, ids], max_tokens=4, temperature=0, echo=True)
    assert len(answer.choices) == 2
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.choices[0].text.startswith("The sea")


def test_greedy_text_does_not_depend_on_the_neighbours(client: openai.OpenAI, model: str) -> None:
    prompts = [f"The number {i} is" for i in range(12)]

    def complete(prompt: str) -> str:
        return client.completions.create(model=model, prompt=prompt, max_tokens=10, temperature=0).choices[0].text

    alone = [complete(prompt) for prompt in prompts[:3]]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(complete, prompts))
    assert together[:3] == alone


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"diffusion": {"strategy": "guess"}}, "diffusion.strategy"),
        ({"diffusion": {"draft_length": 13}}, "diffusion.draft_length"),
        ({"diffusion": {"threshold": 0.5}}, "diffusion.threshold"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    client: openai.OpenAI, model: str, extra: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=QUESTION, extra_body=extra)
    assert refused.value.param == param


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=QUESTION)


def test_too_long_a_request_is_refused_with_the_usual_code(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="The sea", max_tokens=100_000)
    assert refused.value.code == "context_length_exceeded"
