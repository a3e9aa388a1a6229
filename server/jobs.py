"""From a parsed request to the engine's job."""

from __future__ import annotations

import secrets

from .answer import AnswerRules
from .api_errors import BadRequest
from .generation import Job
from .prompts import Prompt
from .requests import ChatRequest, CompletionRequest
from .sampling import resolve_decoding, resolve_sampling
from .service import Service


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def check_choices(body: ChatRequest | CompletionRequest, prompts: int, service: Service) -> None:
    """Refuse what can never be served before anything is tokenised. Raises 400."""
    limit = min(service.settings.max_choices, service.model.capacity)
    if (body.n or 1) > limit:
        raise BadRequest(f"n is at most {limit}", param="n")
    if prompts * (body.n or 1) > service.engine.capacity:
        raise BadRequest(f"this server holds at most {service.engine.capacity} choices at a time", param="prompt")


def make_job(
    identity: str,
    body: ChatRequest | CompletionRequest,
    prompts: list[Prompt],
    service: Service,
    prompt_param: str,
    suffix: list[int] | None = None,
) -> Job:
    """Resolve every parameter against the model. suffix: ids that follow every answer. Raises 400."""
    suffix = suffix or []
    stops = body.stops()
    if stops:
        service.prompts.require_tokenizer("stop")
    sampling = [
        resolve_sampling(body, service.model, len(prompt.ids) + len(suffix), prompt_param) for prompt in prompts
    ]
    return Job(
        id=identity,
        prompts=prompts,
        suffix=suffix,
        sampling=sampling,
        decoding=resolve_decoding(body, service.model),
        n=body.n or 1,
        rules=AnswerRules(
            stops=stops,
            stop_token_ids=frozenset(body.stop_token_ids or ()),
            min_tokens=body.min_tokens or 0,
            include_stop=bool(body.include_stop_str_in_output),
        ),
        skip_special_tokens=body.skip_special_tokens is not False,
        salt=body.cache_salt or "",
    )
