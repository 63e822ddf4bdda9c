"""POST /v1/completions: raw texts or token ids, one or several, each with n answers; prompt p's answer a has index p * n + a."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy import messages
from lmdeploy.answer import Prepared
from lmdeploy.errors import RequestError
from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.protocol import CompletionRequest
from lmdeploy.serving.openai.stream import CompletionChunks, stream_answer
from lmdeploy.serving.service import Service, service_of

MAX_ANSWERS = 512

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", summary="Continue a text")
async def completions(request: Request) -> Response:
    """`prompt` is a text, a list of texts, token ids, or a list of token id lists; no template is applied."""
    service = service_of(request)
    body = await read_body(request, CompletionRequest)
    service.check_model(body.model)
    convert.refuse_unsupported(body)
    with ExitStack() as held:
        held.enter_context(service.session(body.session_id))
        prompts = prompts_of(body)
        if len(prompts) * (body.n or 1) > MAX_ANSWERS:
            raise RequestError(
                f"{len(prompts)} prompts with n={body.n} ask for {len(prompts) * (body.n or 1)} answers; at most {MAX_ANSWERS} per request", param="n"
            )
        gen = convert.completion_config(body, service.defaults)
        prepared = list(await asyncio.gather(*(service.prepare(p, gen, do_preprocess=False) for p in prompts)))
        echo = [_text_of(service, p) for p in prompts] if body.echo else []
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = CompletionChunks(
                service.model_name, gen.n, include_usage=usage, tokenizer=service.frontend.tokenizer, token_ids=bool(body.return_token_ids)
            )
            chunks.top_logprobs, chunks.echo = body.logprobs or 0, echo
            return await stream_answer(request, service, service.merged(prepared), chunks, held.pop_all())
        answers = await service.collect(request, prepared)
    return JSONResponse(_completion(service, body, prepared, answers, echo))


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """One entry per prompt, whatever form they came in."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], int):
        return [body.prompt]
    return list(body.prompt)


def _text_of(service: Service, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.frontend.tokenizer.decode(prompt, skip_special_tokens=False)


def _completion(service: Service, body: CompletionRequest, prepared: list[Prepared], answers: list[list[messages.Response]], echo: list[str]) -> dict[str, Any]:
    choices = []
    for place, group in enumerate(answers):
        before = echo[place] if echo else ""
        choices += [_choice(service, body, prepared[place], a, place * len(group) + a.index, before) for a in group]
    return {
        "id": convert.new_id("cmpl"),
        "object": "text_completion",
        "created": convert.now(),
        "model": service.model_name,
        "choices": choices,
        "usage": convert.usage(
            sum(g[0].input_token_len for g in answers), sum(a.generate_token_len for g in answers for a in g), sum(g[0].cached_tokens for g in answers)
        ),
    }


def _choice(service: Service, body: CompletionRequest, prepared: Prepared, answer: messages.Response, index: int, before: str) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None and answer.logprobs is not None:
        ids, entries = list(answer.token_ids), list[dict[int, float] | None](answer.logprobs)
        if before and answer.prompt_logprobs is not None:
            known = answer.prompt_logprobs
            ids = prepared.token_ids[-len(known) :] + ids
            entries = [*known, *entries]
            if len(known) < len(prepared.token_ids):
                ids, entries = [prepared.token_ids[0], *ids], [None, *entries]
        logprobs = convert.completion_logprobs(ids, entries, body.logprobs, service.frontend.tokenizer)
    choice = {"index": index, "text": before + answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    if body.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice
