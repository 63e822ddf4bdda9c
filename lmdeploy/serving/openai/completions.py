"""POST /v1/completions: raw texts or token ids, one or several, each with n answers; prompt p's answer a has index p * n + a."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lmdeploy import messages
from lmdeploy.answer import Prepared
from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.serving.aside import aside, json_answer, size_of
from lmdeploy.serving.logprob_limit import bounded
from lmdeploy.serving.openai import convert
from lmdeploy.serving.openai.errors import read_body
from lmdeploy.serving.openai.protocol import CompletionRequest, StreamOptions
from lmdeploy.serving.openai.stream import Chunks, stream_answer
from lmdeploy.serving.service import Service, service_of
from lmdeploy.text.tokenizer import Tokenizer

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
        gen = convert.completion_config(body, service.defaults)
        if len(prompts) * gen.n > MAX_ANSWERS:
            field = "n" if gen.n == body.n else "best_of"
            raise RequestError(
                f"{len(prompts)} prompts with {field}={gen.n} ask for {len(prompts) * gen.n} answers; at most {MAX_ANSWERS} per request", param=field
            )
        prepared = bounded(await asyncio.gather(*(_prepare(service, body, p, gen) for p in prompts)), gen.max_new_tokens)
        echo = await aside(lambda: [_text_of(service, p) for p in prompts]) if body.echo else []
        if body.stream:
            chunks = CompletionChunks(service, body, prepared, echo)
            return await stream_answer(request, service, service.merged(prepared), chunks, held.pop_all())
        answers = await service.collect(request, prepared)
    return await json_answer(_completion, service, body, prepared, answers, echo, size=sum(map(size_of, answers)))


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """One entry per prompt, whatever form they came in."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], int):
        return [body.prompt]
    return list(body.prompt)


async def _prepare(service: Service, body: CompletionRequest, prompt: str | list[int], gen: GenerationConfig) -> Prepared:
    if body.max_tokens != 0 or body.max_completion_tokens:
        return await service.prepare(prompt, gen, do_preprocess=False)
    if not body.echo or gen.n > 1:
        raise RequestError("max_tokens=0 asks for no answer; it needs echo=true and n=1, to score the prompt, or a number >= 1", param="max_tokens")
    return service.frontend.prepare_score(await service.token_ids(prompt), gen)


def _text_of(service: Service, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.frontend.tokenizer.decode(prompt, skip_special_tokens=False)


class _Logprobs:
    """The older form of one answer's log-probabilities, part by part; an echoed prompt comes before the first part."""

    def __init__(self, prompt_ids: list[int], before: str, top: int, tokenizer: Tokenizer) -> None:
        self._prompt_ids, self._before, self._top, self._tokenizer = prompt_ids, before, top, tokenizer
        self._offset = len(before)

    def part(self, answer: messages.Response) -> dict[str, Any]:
        """Tokens of this part; `text_offset` counts characters of the whole text."""
        ids, entries = answer.token_ids, list[dict[int, float] | None](answer.logprobs or ())
        if answer.prompt_logprobs is not None:
            ids, entries = self._prompt_ids + ids, [*answer.prompt_logprobs, *entries]
            # a begin token is no part of the echoed text
            self._offset -= sum(len(self._tokenizer.token_bytes(i).decode("utf-8", "replace")) for i in self._prompt_ids)
        out = convert.completion_logprobs(ids, entries, self._top, self._tokenizer, self._offset)
        self._offset += sum(map(len, out["tokens"]))
        return out


class CompletionChunks(Chunks):
    """text_completion"""

    object_name = "text_completion"
    prefix = "cmpl"

    def __init__(self, service: Service, body: CompletionRequest, prepared: list[Prepared], echo: list[str]) -> None:
        options, n, tokenizer = body.stream_options or StreamOptions(), prepared[0].n, service.frontend.tokenizer
        super().__init__(service.model_name, n, include_usage=bool(options.include_usage), tokenizer=tokenizer, token_ids=bool(body.return_token_ids))
        self.continuous_usage = bool(options.continuous_usage_stats)
        self._before = {place * n + i: text for place, text in enumerate(echo) for i in range(n)}  # by answer, until it was sent
        self._logprobs: list[_Logprobs] = []
        if body.logprobs is not None:
            self._logprobs = [
                _Logprobs(p.token_ids, echo[place] if echo else "", body.logprobs, tokenizer) for place, p in enumerate(prepared) for _ in range(n)
            ]

    def choices(self, response: messages.Response) -> Iterator[bytes]:
        """One chunk per increment; the last one carries the finish reason."""
        text = self._before.pop(response.index, "") + response.text
        choice: dict[str, Any] = {"index": response.index, "text": text, "logprobs": None, "finish_reason": response.finish_reason}
        if self._logprobs and (response.logprobs is not None or response.prompt_logprobs is not None):
            choice["logprobs"] = self._logprobs[response.index].part(response)
        if self.token_ids:
            choice["token_ids"] = response.token_ids
        if response.finish_reason is not None:
            choice["stop_reason"] = response.stop_reason
        yield msgspec.json.encode(choice)


def _completion(service: Service, body: CompletionRequest, prepared: list[Prepared], answers: list[list[messages.Response]], echo: list[str]) -> dict[str, Any]:
    choices, n = [], body.n or 1
    for place, group in enumerate(answers):
        before = echo[place] if echo else ""
        choices += [_choice(service, body, prepared[place], a, place * n + i, before) for i, a in enumerate(best(group, n))]
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


def best(group: list[messages.Response], n: int) -> list[messages.Response]:
    """The n answers with the highest mean log-probability per token, best first; all of them, as they came, when there are no more than n."""
    return group if len(group) <= n else sorted(group, key=_mean_logprob, reverse=True)[:n]


def _mean_logprob(answer: messages.Response) -> float:
    entries = answer.logprobs or []
    if not entries:
        return float("-inf")  # it ended before its first token
    return sum(entry[token] for token, entry in zip(answer.token_ids, entries, strict=True)) / len(entries)


def _choice(service: Service, body: CompletionRequest, prepared: Prepared, answer: messages.Response, index: int, before: str) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None and (answer.logprobs is not None or answer.prompt_logprobs is not None):
        logprobs = _Logprobs(prepared.token_ids, before, body.logprobs, service.frontend.tokenizer).part(answer)
    choice = {"index": index, "text": before + answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    if body.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice
