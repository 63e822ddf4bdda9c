"""`Service`: one served model and what its routes share; it lives on the app, never in a module.

Every answer passes through `increments`, so metrics are counted once and closing it (client gone) aborts the request. Routes of
all protocols use `collect` for whole answers and `merged` for streams of several prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from lmdeploy.answer import Merger, Prepared
from lmdeploy.config import GenerationConfig
from lmdeploy.errors import SessionBusyError
from lmdeploy.frontend import Frontend
from lmdeploy.grammar import Grammar, wanted_grammar
from lmdeploy.log import get_logger
from lmdeploy.messages import Response
from lmdeploy.serving.admission import Admission
from lmdeploy.serving.aside import aside
from lmdeploy.serving.call import ANYBODY, CURRENT, Call
from lmdeploy.serving.keys import ADMIN, KeyRing
from lmdeploy.serving.lifecycle import Lifecycle
from lmdeploy.serving.logprob_limit import bounded
from lmdeploy.serving.metrics import Metrics
from lmdeploy.serving.openai.convert import Prompt
from lmdeploy.serving.openai.errors import ClientGone, HttpError, raise_if_failed
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.origins import Origins
from lmdeploy.serving.parsers.registry import reasoning_format, tool_format
from lmdeploy.serving.tool_offer import Guarantee
from lmdeploy.serving.tracing import Tracing, request_attributes
from lmdeploy.vision.policy import MediaPolicy
from lmdeploy.vision.prompt import has_pictures

logger = get_logger(__name__)
T = TypeVar("T")

#: requests whose pictures are fetched and cut at the same time; more wait
MAX_FETCHING = 4
#: requests of routes that compute nothing on the engine (tokenising, counting) that are worked on at a time; more wait
MAX_LIGHT = 8
#: admin orders that are waited for at a time; more wait for these
MAX_ORDERS = 4


class Service:
    """The state of one app: frontend, names, sessions in use, metrics."""

    def __init__(self, frontend: Frontend, config: ServerConfig) -> None:
        self.frontend, self.config = frontend, config
        self.model_name = config.model_name or frontend.model_name
        path = frontend.model_path.rstrip("/")
        #: for callers without a key: where a model lies is nobody's business
        self.shown_name = config.model_name or self.model_name.rstrip("/").rsplit("/", 1)[-1]
        self.served_names = tuple(dict.fromkeys((self.model_name, frontend.model_path, path, path.rsplit("/", 1)[-1], self.shown_name)))
        self.keys, self.lifecycle = KeyRing(config), Lifecycle()
        self.origins = Origins(config, keyed=self.keys.needed)
        batch = frontend.info.max_batch_size
        # a few more than the engine computes together, so that a place in its batch never waits for HTTP
        places = config.max_concurrent_requests or batch + max(batch // 4, 4)
        self.admission = Admission(places, config.max_queue, config.max_queue_seconds, config.max_concurrent_per_key)
        # what needs no engine never waits for those that do
        self.light_admission = Admission(MAX_LIGHT, config.max_queue, config.max_queue_seconds, config.max_concurrent_per_key)
        self.metrics = Metrics(frontend, self.model_name, self.admission)
        self.tracing = Tracing(config.otlp_endpoint, self.model_name) if config.otlp_endpoint else None
        self.defaults: dict[str, Any] = frontend.generation_defaults if config.generation_config == "auto" else {}
        self.tool_format = tool_format(config.tool_call_parser, frontend.template)
        self.reasoning_format = reasoning_format(config.reasoning_parser, frontend.template)
        self.guarantee = None if self.tool_format is None else Guarantee(self._until_checked, self.tool_format)
        self.tag_ids = self._special_tags()  # special tokens that are parts of tags: readers must see them
        self.media = MediaPolicy(
            allowed_domains=None if config.allowed_media_domains is None else tuple(config.allowed_media_domains),
            allowed_path=None if config.allowed_media_path is None else Path(config.allowed_media_path),
        )
        # fetch and decode pictures: threads, not places, so that a client that leaves does not make room before its fetch has ended
        self._eyes = ThreadPoolExecutor(MAX_FETCHING, "pictures")
        # threads of their own: an order may take an hour, and nobody else's work must wait for its thread
        self.orders = ThreadPoolExecutor(MAX_ORDERS, thread_name_prefix="lmdeploy-order")
        self._sessions: set[tuple[str, int]] = set()  # whose, and which
        self._running: dict[int, Call] = {}  # the frontend's id of each request -> whose it is

    def _special_tags(self) -> frozenset[int]:
        tokenizer = self.frontend.tokenizer
        forms = self.tool_format.forms if self.tool_format is not None else ()
        tags = [self.reasoning_format.open, self.reasoning_format.close] if self.reasoning_format is not None else []
        ids = (i for tag in [*tags, *(form.open for form in forms), *(form.close for form in forms)] for i in tokenizer.encode(tag, add_bos=False))
        return frozenset(ids) & tokenizer.special_ids

    def check_model(self, name: str) -> None:
        """Raise 404 unless `name` is the served model: its given name, its path, or the last part of the path."""
        if name not in self.served_names:
            raise HttpError(404, f"The model {name[:200]!r} does not exist. Served: {self.model_name!r}", code="model_not_found", param="model")

    @contextlib.contextmanager
    def session(self, session_id: int | None) -> Iterator[None]:
        """Hold a session id while it is answered; -1 and None need none."""
        if session_id is None or session_id < 0:
            yield
            return
        session = (caller(), session_id)
        if session in self._sessions:
            raise SessionBusyError(f"The session_id {session_id} is occupied.", param="session_id", code="session_busy")
        self._sessions.add(session)
        if (call := CURRENT.get()) is not None:
            call.session = session_id
        try:
            yield
        finally:
            self._sessions.discard(session)

    async def prepare(
        self,
        prompt: Prompt,
        gen: GenerationConfig,
        *,
        do_preprocess: bool = True,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> Prepared:
        """Check and tokenise one prompt."""
        self._log_prompt(prompt)
        if (grammar := wanted_grammar(gen)) is not None:
            await self._until_checked(grammar)
        work = partial(self.frontend.prepare, prompt, gen, media=self.media, do_preprocess=do_preprocess, tools=tools, template_kwargs=template_kwargs)
        prepared = await self._encoded(prompt, work)
        for notice in prepared.notices:
            logger.info("%s", notice)
        return bounded([prepared], gen.max_new_tokens)[0]

    async def encode(
        self,
        prompt: Prompt,
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids that `prepare` would compute for the same prompt, however many."""
        work = partial(
            self.frontend.encode_prompt,
            prompt,
            media=self.media,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            any_length=True,
        )
        return await self._encoded(prompt, work)

    async def _until_checked(self, grammar: Grammar) -> None:
        call = CURRENT.get()
        await self.frontend.grammars.until_checked(grammar, "" if call is None else call.owner)

    async def token_ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text without a template, or checked ids, for requests that compute a prompt alone."""
        self._log_prompt(prompt)
        return await self._encoded(prompt, partial(self.frontend.encode_prompt, prompt, media=self.media, do_preprocess=False))

    async def _encoded(self, prompt: Prompt, work: Callable[[], T]) -> T:
        """The result of `work` on the prompt, done where it stalls nobody: pictures are fetched by a few threads of their own."""
        if has_pictures(prompt):
            return await asyncio.get_running_loop().run_in_executor(self._eyes, work)
        return await aside(work, size=_size(prompt))

    def _log_prompt(self, prompt: Prompt) -> None:
        if self.config.max_log_len:
            logger.info("prompt %r", str(prompt[: self.config.max_log_len])[: self.config.max_log_len])

    async def increments(self, prepared: Prepared) -> AsyncGenerator[Response, None]:
        """The frontend's increments, counted; closing this generator aborts the request. At the call's time limit they end with error 'timeout'."""
        call = CURRENT.get()
        if call is not None and prepared.sampling.grammar is not None:
            prepared = dataclasses.replace(prepared, owner=call.owner)
        if self.keys.needed and not self.config.share_prefix_cache:
            prepared = dataclasses.replace(prepared, cache_salt=caller())
        if call is not None and self.tracing is not None:
            call.request = request_attributes(prepared.sampling, prepared.n)
        observed = self.metrics.request(call)
        ids: list[int] = []

        def began(request_id: int) -> None:
            if call is not None:
                ids.append(request_id)
                self._running[request_id] = call

        try:
            async with aclosing(self.frontend.astream(prepared, None if call is None else call.deadline, began)) as answers:
                async for response in answers:
                    observed.feed(response)
                    yield response
        finally:
            observed.end()
            for request_id in ids:
                del self._running[request_id]

    def abort(self, session_id: int | None, call_id: str | None) -> int:
        """End the running requests of a session, of one call, or all of them, within the caller's own key; how many there were."""
        caller = CURRENT.get()
        own = None if caller is None or caller.key in (ADMIN, ANYBODY) else caller.key
        chosen = [
            request_id
            for request_id, call in self._running.items()
            if own in (None, call.key) and (session_id is None or call.session == session_id) and (call_id is None or call.id == call_id)
        ]
        for request_id in chosen:
            self.frontend.client.abort(request_id)
        return len(chosen)

    async def collect(self, request: Request, prepared: list[Prepared]) -> list[list[Response]]:
        """All answers to all prompts, computed together. Raises the first failure, and ClientGone when nobody waits any more."""
        return await unless_gone(request, self._collect_all(prepared))

    async def _collect_all(self, prepared: list[Prepared]) -> list[list[Response]]:
        if len(prepared) == 1:
            return [await self._collect(prepared[0])]
        return await together([self._collect(p) for p in prepared])

    async def _collect(self, prepared: Prepared) -> list[Response]:
        merged = Merger(prepared.n)
        async with aclosing(self.increments(prepared)) as answers:
            async for response in answers:
                raise_if_failed(response, self.frontend.failure)
                merged.add(response)
        return merged.answers

    async def answer(self, prepared: Prepared) -> Response:
        """The one answer to one request, complete. Raises HttpError when it fails."""
        return (await self._collect(prepared))[0]

    async def merged(self, prepared: list[Prepared]) -> AsyncGenerator[Response, None]:
        """Increments of several prompts as they come; `index` counts over all of them (place * n + answer).

        A slow reader makes the streams wait, and they join what comes meanwhile (`Frontend.astream`).
        """
        if len(prepared) == 1:
            async with aclosing(self.increments(prepared[0])) as answers:
                async for response in answers:
                    yield response
            return
        inbox: asyncio.Queue[Response | Exception | None] = asyncio.Queue(maxsize=len(prepared))
        tasks = [asyncio.ensure_future(self._pour(p, place, inbox)) for place, p in enumerate(prepared)]
        try:
            open_streams = len(tasks)
            while open_streams:
                arrived = await inbox.get()
                if isinstance(arrived, Exception):
                    raise arrived
                if arrived is None:
                    open_streams -= 1
                else:
                    yield arrived
        finally:
            await _cancel(tasks)

    async def _pour(self, prepared: Prepared, place: int, inbox: asyncio.Queue[Response | Exception | None]) -> None:
        try:
            async with aclosing(self.increments(prepared)) as answers:
                async for response in answers:
                    response.index += place * prepared.n
                    await inbox.put(response)
        except Exception as e:
            await inbox.put(e)
        else:
            await inbox.put(None)


async def admitted() -> None:
    """Wait until the current request may be worked on. The gate calls it before nearly all routes; a second call waits for nothing."""
    call = CURRENT.get()
    if call is not None and call.place is not None:
        await call.place.take()
        call.queue_seconds = time.monotonic() - call.began


def caller() -> str:
    """The name of the key that the request came with; sessions and cached prompts are its own."""
    call = CURRENT.get()
    return ANYBODY if call is None else call.key


def _size(prompt: Prompt) -> int:
    """About how much there is to tokenise, where the body does not tell: a conversation that the server keeps."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return len(prompt)
    return sum(len(m["content"] or "") for m in prompt if isinstance(m, dict))


def service_of(request: Request) -> Service:
    """The service of the app that got the request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises ClientGone, and cancels it, when the client closes its connection first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel([task, watch])


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first failure cancels the others and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
