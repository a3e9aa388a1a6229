"""From a request and the model's defaults to the engine's parameters."""

from __future__ import annotations

import secrets

from msgspec import UnsetType

from linocut.engine.decoding.parameters import resolve
from linocut.engine.messages import ModelInfo
from linocut.engine.params import DecodingParams, SamplingParams

from .api_errors import BadRequest
from .requests import ChatRequest, CompletionRequest, GenerateRequest

_DEFAULT_COMPLETION = 16  # OpenAI's, of /v1/completions only


def resolve_decoding(request: GenerateRequest, model: ModelInfo) -> DecodingParams:
    """The `diffusion` object over the operator's defaults. Raises ParameterError naming `diffusion.<field>`."""
    return resolve(model, request.diffusion, model.default_strategy, model.default_parameters)


def resolve_sampling(
    request: ChatRequest | CompletionRequest, model: ModelInfo, prompt_tokens: int, prompt_param: str
) -> SamplingParams:
    """Everything the client left out, filled in. Raises 400, `context_length_exceeded` among others."""
    defaults = model.default_sampling

    def chosen(name: str, given: float | None, fallback: float) -> float:
        return defaults.get(name, fallback) if given is None else given

    top_k = int(chosen("top_k", request.top_k, 0))
    stop_ids = tuple(dict.fromkeys(request.stop_token_ids or ()))
    if any(token >= model.vocab_size for token in stop_ids):
        raise BadRequest(f"a token id is below {model.vocab_size}", param="stop_token_ids")
    max_tokens = _room(request, model, prompt_tokens, prompt_param)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise BadRequest(f"min_tokens exceeds the {max_tokens} tokens that may be generated", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=chosen("temperature", request.temperature, 1.0),
        top_p=chosen("top_p", request.top_p, 1.0),
        top_k=0 if top_k <= 0 or top_k >= model.vocab_size else top_k,
        min_p=chosen("min_p", request.min_p, 0.0),
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        stop_token_ids=stop_ids,
        ignore_eos=bool(request.ignore_eos),
        min_tokens=min_tokens,
    )


def _room(request: ChatRequest | CompletionRequest, model: ModelInfo, prompt_tokens: int, prompt_param: str) -> int:
    """How many tokens may be generated: what was asked for, or what the context has left."""
    limit = model.max_model_len
    left = limit - prompt_tokens
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if isinstance(asked, UnsetType):
        asked = min(_DEFAULT_COMPLETION, max(left, 1))
    if left < 1 or (asked is not None and asked > left):
        wanted = max(asked or 1, 1)
        raise BadRequest(
            f"This model's maximum context length is {limit} tokens. However, you requested {prompt_tokens + wanted} "
            f"tokens ({prompt_tokens} in the {prompt_param}, {wanted} in the completion). Please reduce the length of "
            f"the {prompt_param} or completion.",
            param=prompt_param,
            code="context_length_exceeded",
        )
    return min(left, model.default_max_tokens or left) if asked is None else asked
