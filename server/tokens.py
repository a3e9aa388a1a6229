"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .api_errors import BadRequest
from .body import convert
from .json_response import json_response
from .requests import DetokenizeRequest, TokenizeChat, TokenizeText
from .service import service_of
from .unsupported import CHAT, NO_EFFECT, reject_unsupported

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    service = service_of(request)
    raw = await service.read(request)
    if ("messages" in raw) == ("prompt" in raw):
        raise BadRequest("send either prompt or messages", param="prompt")
    kind: type[TokenizeChat] | type[TokenizeText] = TokenizeChat if "messages" in raw else TokenizeText
    if kind is TokenizeChat:
        reject_unsupported(raw, CHAT)
    service.unknown_fields.note(
        name for name in raw if name not in kind.__struct_fields__ and name not in CHAT and name not in NO_EFFECT
    )
    body: TokenizeChat | TokenizeText = convert(raw, kind)
    service.resolve_model(body.model)
    if isinstance(body, TokenizeText):
        prompt = await service.prompts.text(body.prompt, body.add_special_tokens is not False)
    else:
        prompt = await service.prompts.chat(body)
    tokenizer = service.prompts.require_tokenizer("prompt")
    return json_response(
        {
            "count": len(prompt.ids),
            "max_model_len": service.model.max_model_len,
            "tokens": prompt.ids,
            "token_strs": tokenizer.token_strings(prompt.ids) if body.return_token_strs else None,
        }
    )


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    service = service_of(request)
    body = convert(await service.read(request), DetokenizeRequest)
    service.resolve_model(body.model)
    if any(token >= service.model.vocab_size for token in body.tokens):
        raise BadRequest(f"a token id is below {service.model.vocab_size}", param="tokens")
    text = await service.prompts.decode(body.tokens)
    return json_response({"prompt": text})
