"""What the engine itself checks of a request, whoever sent it. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from .decoding.parameters import resolve
from .errors import ParameterError
from .messages import AddRequest, ModelInfo


def check_request(info: ModelInfo, request: AddRequest, in_use: bool, *, needs_prompt: bool = True) -> None:
    """Raise ParameterError for what would harm the engine or cannot fit it. in_use: its id is a running request's."""
    if in_use:
        raise ParameterError("request_id", f"request id {request.request_id!r} is in use")
    if request.n < 1:
        raise ParameterError("n", "n must be at least 1")
    if needs_prompt and not request.prompt:
        raise ParameterError("prompt", "the prompt is empty")
    if _beyond(request.prompt, info.vocab_size):
        raise ParameterError("prompt", f"token ids must lie in 0..{info.vocab_size - 1}")
    if _beyond(request.sampling.stop_token_ids, info.vocab_size):
        raise ParameterError("stop_token_ids", f"token ids must lie in 0..{info.vocab_size - 1}")
    if request.sampling.max_tokens < 1:
        raise ParameterError("max_tokens", "max_tokens must be at least 1")
    if request.suffix and info.context != "full":
        why = f"a {info.context} model does not see what follows its text: suffix needs full attention"
        raise ParameterError("suffix", why)
    if _beyond(request.suffix, info.vocab_size):
        raise ParameterError("suffix", f"token ids must lie in 0..{info.vocab_size - 1}")
    known = len(request.prompt) + len(request.suffix)
    if known + request.sampling.max_tokens > info.max_model_len:
        raise ParameterError(
            "max_tokens",
            f"the maximum context length is {info.max_model_len} tokens, but the prompt "
            f"{'and suffix have' if request.suffix else 'has'} {known} and max_tokens is {request.sampling.max_tokens}",
            code="context_length_exceeded",
        )
    if request.sampling.min_tokens > request.sampling.max_tokens:
        raise ParameterError("min_tokens", "min_tokens must not exceed max_tokens")
    resolve(info, {"strategy": request.decoding.strategy, **request.decoding.values})


def _beyond(ids: Collection[int], vocab: int) -> bool:
    """Whether some id is none of a vocabulary's."""
    return bool(ids) and not (min(ids) >= 0 and max(ids) < vocab)
