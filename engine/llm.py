"""The offline API: batch generation on the same core as the server, in this process."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .config import EngineConfig
from .core import EngineCore
from .decoding.parameters import resolve
from .errors import ParameterError
from .loading import load_model
from .messages import AddRequest
from .models.source import resolve_model
from .params import SamplingParams


@dataclass
class Completion:
    """One choice. token_ids include the stop id that ended it, text does not."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
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
        self.config = EngineConfig(model=str(folder), **config)
        self.core = EngineCore(load_model(self.config), check_invariants=self.config.check_invariants)
        self._names = itertools.count()
        self._tokenizer: Any = None

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

        `sampling` are fields of SamplingParams; without a seed one is drawn. Raises ParameterError.
        """
        sampling.setdefault("seed", secrets.randbits(63))
        try:
            params = msgspec.convert({"max_tokens": max_tokens, **sampling}, SamplingParams)
        except msgspec.ValidationError as error:
            raise ParameterError("sampling", str(error)) from None
        decoding = resolve(
            self.core.info, diffusion, self.core.info.default_strategy, self.core.info.default_parameters
        )
        answers: dict[str, list[Completion]] = {}
        requests = []
        for prompt in prompts:
            name = f"offline-{next(self._names)}"
            ids = self.tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else list(prompt)
            requests.append(AddRequest(request_id=name, prompt=ids, sampling=params, decoding=decoding, n=n))
            answers[name] = [Completion() for _ in range(n)]
        for request in requests:
            self.core.validate(request)
        for request in requests:
            self.core.add(request)
        stops: dict[tuple[str, int], int | None] = {}
        while self.core.busy:
            for output in self.core.step():
                completion = answers[output.request_id][output.choice]
                completion.token_ids += output.token_ids
                completion.forwards = output.forwards
                completion.cached_tokens = output.cached_tokens
                if output.finish_reason:
                    completion.finish_reason = output.finish_reason
                    stops[output.request_id, output.choice] = output.stop_token
        if any(isinstance(prompt, str) for prompt in prompts):
            for name, choices in answers.items():
                for index, completion in enumerate(choices):
                    ids = completion.token_ids
                    ids = ids[:-1] if stops[name, index] is not None else ids
                    completion.text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return list(answers.values())

    def chat(self, conversations: Items[list[dict[str, str]]], **options: Any) -> list[list[Completion]]:
        """`generate` on messages, through the checkpoint's chat template."""
        prompts = [
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for messages in conversations
        ]
        return self.generate(prompts, **options)
