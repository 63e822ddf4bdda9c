"""Text <-> token ids: POST /v1/encode, /tokenize, /detokenize. And POST /get_ppl: how likely a text is."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.serving.aside import aside, json_answer
from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.protocol import DetokenizeRequest, EncodeRequest, PerplexityRequest, TokenizeRequest
from lmdeploy.serving.service import Service, service_of, unless_gone
from lmdeploy.serving.tool_offer import offer_of, with_code_prompt

router = APIRouter(tags=["lmdeploy"])


@router.post("/v1/encode", summary="Tokenise one text or many")
async def encode(request: Request) -> Response:
    """`do_preprocess` applies the chat template first. A list of texts gives a list of id lists."""
    service = service_of(request)
    body = await read_body(request, EncodeRequest)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if body.do_preprocess:
        ids = [await service.encode(text) for text in texts]
    else:
        ids = await asyncio.to_thread(_encode, service, texts, body.add_bos is not False)
    lengths = [len(i) for i in ids]
    one = isinstance(body.input, str)
    return await json_answer(lambda: {"input_ids": ids[0] if one else ids, "length": lengths[0] if one else lengths})


def _encode(service: Service, texts: list[str], add_bos: bool) -> list[list[int]]:
    return [service.frontend.tokenizer.encode(text, add_bos=add_bos) for text in texts]


@router.post("/tokenize", summary="Tokenise a text or a conversation")
async def tokenize(request: Request) -> Response:
    """Exactly one of `prompt` and `messages`; what /v1/completions or /v1/chat/completions would compute, however long it is."""
    service = service_of(request)
    body = await read_body(request, TokenizeRequest)
    service.check_model(body.model or service.model_name)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give exactly one of prompt and messages", param="prompt")
    ids = await _tokenize(service, body)
    return await json_answer(_tokens, service, body, ids)


def _tokens(service: Service, body: TokenizeRequest, ids: list[int]) -> dict[str, Any]:
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.frontend.info.session_len}
    if body.return_token_strs:
        answer["token_strs"] = [service.frontend.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    return answer


async def _tokenize(service: Service, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return (await asyncio.to_thread(_encode, service, [body.prompt], body.add_special_tokens is not False))[0]
    offer = offer_of(body.tools, "auto", service.tool_format)
    messages = await aside(convert.messages_of, body.messages or [])
    return await service.encode(
        with_code_prompt(messages) if offer.code else messages,
        tools=offer.shown or None,
        template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
    )


@router.post("/detokenize", summary="The text of token ids")
async def detokenize(request: Request) -> Response:
    """Special tokens are shown unless `skip_special_tokens`."""
    service = service_of(request)
    body = await read_body(request, DetokenizeRequest)
    service.check_model(body.model or service.model_name)
    tokenizer = service.frontend.tokenizer
    limit = service.frontend.info.vocab_size
    if (largest := max(body.tokens, default=0)) >= limit:
        raise RequestError(f"tokens: token id {largest} is not in [0, {limit - 1}]", param="tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=bool(body.skip_special_tokens))})


@router.post("/get_ppl", summary="Mean cross-entropy of a text")
async def get_ppl(request: Request) -> Response:
    """`ppl` is the mean of -log p over all tokens but the first, in nats; exp(ppl) is the perplexity."""
    service = service_of(request)
    body = await read_body(request, PerplexityRequest)
    service.check_model(body.model or service.model_name)
    ids = await service.token_ids(body.input)
    if len(ids) < 2:
        raise RequestError("the input has one token; at least 2 are needed, as the first has no probability", param="input")
    prepared = service.frontend.prepare_score(ids, GenerationConfig(prompt_logprobs=0))
    answer = await unless_gone(request, service.answer(prepared))
    entries = answer.prompt_logprobs or []
    losses = [-convert.finite(entry[token]) for token, entry in zip(ids, entries, strict=True) if entry is not None]
    return JSONResponse({"ppl": math.fsum(losses) / len(losses), "tokens": len(ids)})
