"""The offline API: batch generation on the same core as the server, in this process."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .config import EngineConfig
from .cores import Core, load_core
from .decoding.parameters import resolve
from .errors import ConfigError, ParameterError
from .messages import Abort, AddRequest
from .models.source import resolve_model
from .params import SamplingParams


@dataclass
class Completion:
    """One choice. token_ids include the stop id that ended it (`stop_token`), text does not."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    stop_token: int | None = None
    forwards: int = 0
    cached_tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / max(self.forwards, 1)


class LLM:
    """`LLM(model).generate(prompts, max_tokens=64)`.

    model: folder, hub id, or None for the embedded model. Further keywords are fields of EngineConfig.
    """

    def __init__(self, model: str | None = None, **config: Any) -> None:
        folder = resolve_model(model)
        try:
            self.config = msgspec.convert({"model": str(folder), **config}, EngineConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(str(error).replace("`$.", "`")) from None
        self.core: Core = load_core(self.config)
        self._names = itertools.count()
        self._tokenizer: Any = None

    def close(self) -> None:
        """End the processes of a tensor-parallel model; else they end with this one."""
        self.core.close()

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer (transformers), loaded at first use."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.config.model)
        return self._tokenizer

    def generate(
        self,
        prompts: Items[str | list[int]],
        *,
        max_tokens: int = 128,
        n: int = 1,
        diffusion: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt (text or token ids), all batched together.

        `sampling` are fields of SamplingParams; what is left out is the checkpoint's default, and each prompt draws a
        seed of its own unless one is given. Texts are encoded with the tokenizer's special tokens (BOS); only for them
        `text` is filled in. Raises ParameterError.
        """
        decoding = resolve(
            self.core.info, diffusion, self.core.info.default_strategy, self.core.info.default_parameters
        )
        answers: dict[str, list[Completion]] = {}
        requests = []
        for prompt in prompts:
            name = f"offline-{next(self._names)}"
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            params = self._sampling(max_tokens, sampling)
            requests.append(AddRequest(request_id=name, prompt=ids, sampling=params, decoding=decoding, n=n))
            answers[name] = [Completion() for _ in range(n)]
        for request in requests:
            self.core.validate(request)
        try:
            self._run(requests, answers)
        finally:
            # After an exception nothing may be left to answer into the next call.
            for request in requests:
                self.core.abort(Abort(request_id=request.request_id))
        if any(isinstance(prompt, str) for prompt in prompts):
            self._detokenize(answers.values())
        return list(answers.values())

    def _sampling(self, max_tokens: int, given: dict[str, Any]) -> SamplingParams:
        defaults = {**self.core.info.default_sampling, "seed": secrets.randbits(63)}
        if "top_k" in defaults:
            defaults["top_k"] = int(defaults["top_k"])
        try:
            return msgspec.convert({**defaults, "max_tokens": max_tokens, **given}, SamplingParams)
        except msgspec.ValidationError as error:
            raise ParameterError("sampling", str(error)) from None

    def _run(self, requests: list[AddRequest], answers: dict[str, list[Completion]]) -> None:
        """Serve `requests` to their end, into `answers`."""
        for request in requests:
            self.core.add(request)
        while self.core.busy:
            for output in self.core.step():
                completion = answers[output.request_id][output.choice]
                completion.token_ids += output.token_ids
                completion.forwards = output.forwards
                completion.cached_tokens = output.cached_tokens
                if output.finish_reason:
                    completion.finish_reason = output.finish_reason
                    completion.stop_token = output.stop_token

    def _detokenize(self, answers: Iterable[list[Completion]]) -> None:
        for completion in itertools.chain.from_iterable(answers):
            ids = completion.token_ids if completion.stop_token is None else completion.token_ids[:-1]
            completion.text = self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, conversations: Items[list[dict[str, str]]], **options: Any) -> list[list[Completion]]:
        """`generate` on messages, through the checkpoint's chat template. Raises ParameterError for a canvas model."""
        if self.core.info.context == "canvas":
            raise ParameterError("messages", "a canvas model was not trained on conversations: use generate")
        texts = [
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for messages in conversations
        ]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        answers = self.generate(ids, **options)
        self._detokenize(answers)
        return answers
