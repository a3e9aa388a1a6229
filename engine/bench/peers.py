"""Other engines on the same weights: transformers' `generate`, and llama.cpp where its Python package is installed."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .generation import Wave


class TransformersPeer:
    """transformers' own Llama/Qwen on the same folder, dtype and threads: one batch, padded on the left."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, stops: tuple[int, ...]) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self._device, self._stops = device, stops
        self.name = "transformers generate"
        self.most: int | None = None

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int, ignore_eos: bool) -> Wave:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        options: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        if ignore_eos:
            options["min_new_tokens"] = tokens
        if self._stops:
            options["eos_token_id"] = list(self._stops)
        first = _FirstToken(self._device)
        began = time.perf_counter()
        out = self._model.generate(ids, max_new_tokens=tokens, stopping_criteria=[first], **options)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - began
        stops = () if ignore_eos else self._stops
        texts = [_until_stop(row, stops) for row in out[:, longest:].tolist()]
        return Wave(texts, seconds, (first.at or time.perf_counter()) - began, sum(map(len, texts)))


class _FirstToken:
    """A stopping criterion that stops nothing: it notes when it is asked first, which is after the first token."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.at: float | None = None

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.at is None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.at = time.perf_counter()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


class LlamaPeer:
    """llama.cpp on a GGUF file, through llama-cpp-python, one prompt at a time, with as many threads as torch has."""

    def __init__(self, path: Path, context: int, device: torch.device, stops: tuple[int, ...]) -> None:
        """Raises ConfigError if the file cannot be read or llama-cpp-python is not installed."""
        if not path.is_file():
            raise ConfigError(f"--gguf: there is no file {path}")
        try:
            Llama = importlib.import_module("llama_cpp").Llama
        except ImportError:
            raise ConfigError("--gguf needs the package llama-cpp-python") from None
        threads = torch.get_num_threads()
        layers = -1 if device.type == "cuda" else 0
        sizes = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": layers}
        try:
            self._llama = Llama(str(path), verbose=False, **sizes)
        except ValueError as error:
            raise ConfigError(f"llama.cpp cannot load {path}: {error}") from None
        self._stops = stops
        self.name = "llama.cpp"
        self.most: int | None = 1

    def run(self, prompts: list[list[int]], tokens: int, ignore_eos: bool) -> Wave:
        (prompt,) = prompts
        text: list[int] = []
        first = None
        began = time.perf_counter()
        # Without a reset it would keep what it knows of a common beginning.
        self._llama.reset()
        for token in self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            first = first or time.perf_counter() - began
            text.append(int(token))
            if len(text) == tokens or (not ignore_eos and text[-1] in self._stops):
                break
        seconds = time.perf_counter() - began
        return Wave([text], seconds, first or seconds, len(text))


def _until_stop(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """Everything up to the first stop id, which belongs to it; behind it a batch is padded."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
