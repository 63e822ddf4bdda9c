"""POST /generate: text or ids in, text and ids out, without OpenAI's envelope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lmdeploy import messages
from lmdeploy.errors import RequestError
from lmdeploy.serving.aside import json_answer, size_of
from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.protocol import GenerateRequest
from lmdeploy.serving.openai.stream import DONE, Chunks, stream_answer
from lmdeploy.serving.service import service_of

router = APIRouter(tags=["lmdeploy"])


@router.post("/generate", summary="Continue a text or token ids")
async def generate(request: Request) -> Response:
    """Exactly one of `prompt` and `input_ids`; no template is applied."""
    service = service_of(request)
    body = await read_body(request, GenerateRequest)
    if (body.prompt is None) == (body.input_ids is None):
        raise RequestError("give exactly one of prompt and input_ids", param="prompt")
    prompt: convert.Prompt = body.prompt if body.prompt is not None else list(body.input_ids or ())
    with ExitStack() as held:
        held.enter_context(service.session(body.session_id))
        prepared = await service.prepare(prompt, convert.generate_config(body, service.defaults), do_preprocess=False)
        if body.stream:
            chunks = GenerateChunks(service.model_name, 1, include_usage=False, tokenizer=service.frontend.tokenizer)
            return await stream_answer(request, service, service.increments(prepared), chunks, held.pop_all())
        answers = await service.collect(request, [prepared])
    return await json_answer(_answer, answers[0][0], size=size_of(answers[0]))


class GenerateChunks(Chunks):
    """Increments in the form of the whole answer."""

    def encode(self, response: messages.Response) -> bytes:
        """One event per increment."""
        return b"data: " + msgspec.json.encode(_answer(response)) + b"\n\n"

    def choices(self, response: messages.Response) -> Iterator[bytes]:
        """There are no choices here."""
        return iter(())

    def last(self) -> bytes:
        """Only the end mark."""
        return DONE


def _answer(response: messages.Response) -> dict[str, Any]:
    logprobs = None
    if response.logprobs is not None:
        logprobs = [[convert.finite(entry[token]), token] for token, entry in zip(response.token_ids, response.logprobs, strict=True)]
    return {
        "text": response.text,
        "output_ids": response.token_ids,
        "meta_info": {
            "prompt_tokens": response.input_token_len,
            "completion_tokens": response.generate_token_len,
            "finish_reason": {"type": response.finish_reason} if response.finish_reason else None,
            "output_token_logprobs": logprobs,
            "cached_tokens": response.cached_tokens,
        },
    }
