"""The text side of the engine, shared by the Python API, the terminal and the server.

`prepare` turns a prompt into token ids and checked sampling parameters (the one door: nobody validates after it); `stream`,
`generate` and their async twins submit it and turn the engine's token ids back into text. The engine may be a thread of this
process or a process of its own: an `EngineClient` either way. Detokenising happens in the caller's thread or event loop,
never on the engine's thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from lmdeploy.answer import Answer, Merger, Prepared, answers_to, joined, merge_increments
from lmdeploy.checkpoint.defaults import read_generation_defaults
from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig
from lmdeploy.delivery import PATIENCE, AsyncSink, Sink, ThreadSink, deliver
from lmdeploy.engine.client import EngineClient, weak_listener
from lmdeploy.engine.grammar_check import GrammarChecker
from lmdeploy.engine.supervisor import SupervisedEngine, Supervision
from lmdeploy.errors import EngineError, RequestError
from lmdeploy.grammar import Grammar, wanted_grammar
from lmdeploy.log import get_logger
from lmdeploy.messages import SLEEPING, EngineInfo, EngineOutput, EngineRequest, EngineStats, Order, Response, SamplingParams, StepOutputs
from lmdeploy.models.language_spec import language_spec
from lmdeploy.prompts import Prompt, PromptEncoder, too_long
from lmdeploy.spec import ModelSpec
from lmdeploy.text.chat_template import ChatTemplate, load_chat_template
from lmdeploy.text.fit import check_fit
from lmdeploy.text.tokenizer import Tokenizer
from lmdeploy.vision.policy import MediaPolicy
from lmdeploy.vision.spec import VisionSpec, load_vision_spec

logger = get_logger(__name__)


class Frontend:
    """One model as its callers see it: text in, `Response` increments out. Safe to use from many threads and event loops."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        spec: ModelSpec,
        *,
        model_name: str,
        model_path: str,
        generation_defaults: dict[str, Any] | None = None,
        max_waiting: int = 4096,
        vision: VisionSpec | None = None,
    ) -> None:
        self.prompts = PromptEncoder(tokenizer, template, vision, vocab_size=client.info.vocab_size, session_len=client.info.session_len)
        self.client, self.tokenizer, self.template, self.spec = client, tokenizer, template, spec
        self.model_name, self.model_path = model_name, model_path
        self.generation_defaults = generation_defaults or {}
        self._ids = itertools.count(1)
        self._sinks: dict[int, tuple[Sink, int]] = {}  # and the number of answers
        self._counting = threading.RLock()  # re-entrant: a forgotten generator may be collected, and drop its request, at any point
        self._asleep: frozenset[str] = frozenset()
        self._ordering = threading.Lock()  # one order at a time, so that `_asleep` is what the last one left
        self._in_flight = 0  # answers of all submitted requests
        self._room = max(max_waiting // 2, 1)  # a batch fills the engine's queue up to here; the rest is for others
        self.grammars = GrammarChecker(tokenizer.folder, client.info.vocab_size, spec.eos_token_ids)
        # weak: the engine's thread must not keep a frontend alive that nobody uses any more. A forgotten `close` then happens when
        # the frontend is collected, and at the latest before the interpreter ends: it must not end under a running step.
        client.start(weak_listener(self._on_outputs))
        self._closer = weakref.finalize(self, _close, client, self.grammars)

    @classmethod
    def open(
        cls,
        model_path: str | None,
        config: EngineConfig,
        chat_template_config: ChatTemplateConfig | None = None,
        *,
        separate_process: bool = False,
        model_name: str | None = None,
        supervision: Supervision | None = None,
    ) -> Frontend:
        """Load a model folder, hub id or (None) the embedded model. Raises ConfigError, CheckpointError or EngineError.

        An engine in a separate process is restarted when it fails, as `supervision` says.
        """
        folder = resolve_model(model_path, config.download_dir, config.revision)
        if chat_template_config is None and config.model_name is not None:
            chat_template_config = template_by_name(config.model_name)
        spec, vision = language_spec(folder, config.hf_overrides), load_vision_spec(folder)
        whole = spec if vision is None else dataclasses.replace(spec, model_type=f"{vision.family} {spec.model_type}")  # what its template was made for
        defaults = read_generation_defaults(folder)
        with ThreadPoolExecutor(1) as pool:  # the tokenizer loads while the engine reads its weights
            starting = pool.submit(_start_client, folder, config, separate_process, supervision)
            try:
                tokenizer = Tokenizer(folder)
                template = load_chat_template(folder, whole, tokenizer, chat_template_config)
            except BaseException:
                with contextlib.suppress(Exception):
                    starting.result().close()
                raise
            client = starting.result()
        try:  # only now: when the weights contradict config.json themselves, the engine's line says more
            check_fit(folder, tokenizer, template, spec)
        except BaseException:
            client.close()
            raise
        return cls(
            client,
            tokenizer,
            template,
            spec,
            model_name=model_name or str(model_path or folder.name),
            model_path=str(model_path or folder),
            generation_defaults=defaults,
            max_waiting=config.max_waiting,
            vision=vision,
        )

    # ------------------------------------------------------------------ what the engine says of itself

    @property
    def info(self) -> EngineInfo:
        """Facts of the started engine: lengths, memory bill, kernels."""
        return self.client.info

    @property
    def sees(self) -> bool:
        """Whether messages may hold pictures."""
        return self.prompts.vision is not None

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, or None."""
        return self.client.failure

    @property
    def trouble(self) -> str | None:
        """Why requests are refused at the moment, or None: the engine is dead, or being restarted."""
        return self.client.trouble

    @property
    def asleep(self) -> frozenset[str]:
        """What sleeps: 'weights', 'kv_cache', both or nothing."""
        return self._asleep

    def sleep(self, level: int = 1, drain_seconds: float = 30.0) -> None:
        """Give back memory until `wakeup`: level 1 the KV cache and, on a GPU, the weights (kept in host memory), level 2 both on any device.

        Requests are refused from now on; those that run may end within `drain_seconds`, then they are aborted.
        """
        if level not in (1, 2):
            raise RequestError(f"level={level} must be 1 or 2", param="level")
        with self._ordering:
            before, self._asleep = self._asleep, frozenset(SLEEPING)
            try:
                self.client.obey(Order(action="sleep", level=level, drain_seconds=drain_seconds)).result()
            except BaseException:
                self._asleep = before
                raise

    def wakeup(self, tags: Iterable[str] = ()) -> None:
        """Bring back what `tags` name ('weights', 'kv_cache'; none = all). Requests are taken when nothing sleeps any more."""
        wanted = frozenset(tags) or frozenset(SLEEPING)
        if unknown := sorted(wanted - set(SLEEPING)):
            raise RequestError(f"tags={unknown[0]!r} is not one of {', '.join(SLEEPING)}", param="tags")
        self._order(Order(action="wake", tags=tuple(sorted(wanted))))  # always: the engine knows best what sleeps

    def update_weights(self, folder: str | Path, drain_seconds: float = 30.0) -> None:
        """Replace the weights by those of a folder of the same model; raises CheckpointError when they do not fit, and keeps the old ones.

        Running requests end with the old weights, or are aborted after `drain_seconds`; those that come meanwhile wait for the new ones.
        """
        self._order(Order(action="update_weights", path=str(folder), drain_seconds=drain_seconds))

    def _order(self, order: Order) -> None:
        with self._ordering:
            self.client.obey(order).result()
            self._asleep = order.sleeping_after(self._asleep)

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self.client.stats()

    # ------------------------------------------------------------------ text -> request

    def prepare(
        self,
        prompt: Prompt,
        gen: GenerationConfig,
        *,
        do_preprocess: bool = True,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        rope_length: int = 0,
        cache_salt: str = "",
        media: MediaPolicy | None = None,
    ) -> Prepared:
        """Check and tokenise one prompt: text, OpenAI messages, or token ids. Raises RequestError naming field, value and limit.

        `media` says where pictures may come from; without it none are taken.
        """
        ids, pictures = self.prompts.encode(prompt, do_preprocess=do_preprocess, tools=tools, template_kwargs=template_kwargs, media=media)
        session_len, pool = self.info.session_len, self.info.memory.num_blocks * self.info.memory.block_size
        room = min(session_len, pool) - len(ids)
        if room < 1:
            raise too_long(ids, pictures, session_len, pool)
        notices = []
        wanted = gen.max_new_tokens
        if wanted is not None and wanted > room:
            if "max_new_tokens" in gen.given:
                limit = f"session_len={session_len} tokens" if session_len <= pool else f"the KV cache's {pool} tokens"
                notices.append(f"max_new_tokens={wanted} cut to {room}: the prompt takes {len(ids)} of {limit}")
            wanted = room
        return Prepared(
            token_ids=ids,
            sampling=self._sampling(gen, wanted if wanted is not None else room),
            n=gen.n,
            # ignore_eos silences the template's stops (its token ids are masked in the engine), never the caller's own words
            stop_words=_unique([*(() if gen.ignore_eos else self.template.stop_words), *(gen.stop_words or ())]),
            skip_special_tokens=gen.skip_special_tokens,
            spaces_between_special_tokens=gen.spaces_between_special_tokens,
            include_stop=gen.include_stop_str_in_output,
            rope_length=rope_length,
            cache_salt=cache_salt,
            pictures=pictures,
            notices=notices,
        )

    def prepare_score(self, token_ids: list[int], gen: GenerationConfig) -> Prepared:
        """A request that only computes its prompt (log-probabilities, logits); may be as long as session_len."""
        sampling = self._sampling(gen, 0)
        return Prepared(self.prompts.checked_ids(token_ids), sampling, 1, [], True, True, False)

    def prepare_embedding(self, token_ids: list[int], pooling: Literal["mean", "last"]) -> Prepared:
        """A request for the pooled last hidden state of its prompt, scaled to length 1; the prompt may be as long as session_len."""
        return Prepared(self.prompts.checked_ids(token_ids), SamplingParams(max_new_tokens=0, embed=pooling), 1, [], True, True, False)

    def encode_prompt(self, prompt: Prompt, *, media: MediaPolicy | None = None, **options: Any) -> list[int]:
        """Token ids of a prompt; `media` as for `prepare`, `options` those of `PromptEncoder.encode`."""
        return self.prompts.encode(prompt, media=media, **options)[0]

    def _sampling(self, gen: GenerationConfig, max_new_tokens: int) -> SamplingParams:
        stop_ids = _unique([*self.own_stop_ids, *self._in_vocabulary(gen.stop_token_ids or (), "stop_token_ids")])
        for name, top in (("logprobs", gen.logprobs), ("prompt_logprobs", gen.prompt_logprobs)):
            if top is not None and top > self.info.vocab_size:
                raise RequestError(f"{name}={top} is more than the vocabulary's {self.info.vocab_size} tokens", param=name)
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(gen.min_new_tokens or 0, max_new_tokens),
            temperature=gen.temperature if gen.samples else 0.0,
            top_k=gen.top_k,
            top_p=gen.top_p,
            min_p=gen.min_p,
            repetition_penalty=gen.repetition_penalty,
            presence_penalty=gen.presence_penalty,
            frequency_penalty=gen.frequency_penalty,
            seed=gen.random_seed if gen.random_seed is not None else secrets.randbits(63),
            stop_token_ids=tuple(stop_ids),
            ignore_eos=gen.ignore_eos,
            bad_words=self._bad_words(gen),
            logit_bias=self._logit_bias(gen),
            logprobs=gen.logprobs,
            prompt_logprobs=gen.prompt_logprobs,
            output_logits=gen.output_logits,  # type: ignore[arg-type]  # checked by its choices
            output_last_hidden_state=gen.output_last_hidden_state,  # type: ignore[arg-type]
            grammar=self._checked_grammar(gen),
        )

    @property
    def own_stop_ids(self) -> list[int]:
        """The tokens with which the model ends its answers."""
        eos = self.tokenizer.eos_token_id
        own = [*self.template.stop_token_ids, *self.spec.eos_token_ids, *(() if eos is None else (eos,))]
        # the model never produces an id that it does not have; of its files' ids that was told at the start
        return [i for i in own if 0 <= i < self.info.vocab_size]

    def _checked_grammar(self, gen: GenerationConfig) -> Grammar | None:
        if (grammar := wanted_grammar(gen)) is not None:
            self.grammars.check(grammar)
        return grammar

    def _bad_words(self, gen: GenerationConfig) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each bad word, at the start of a word and inside a text (with a space before)."""
        sequences: list[tuple[int, ...]] = [(i,) for i in self._in_vocabulary(gen.bad_token_ids or (), "bad_token_ids")]
        for word in gen.bad_words or ():
            for form in (word, " " + word):
                ids = tuple(self.tokenizer.encode(form, add_bos=False))
                if ids:
                    sequences.append(ids)
        return tuple(_unique(sequences))

    def _logit_bias(self, gen: GenerationConfig) -> dict[int, float]:
        self._in_vocabulary(gen.logit_bias or (), "logit_bias")
        return dict(gen.logit_bias or {})

    def _in_vocabulary(self, ids: Iterable[int], name: str) -> list[int]:
        checked = list(ids)
        for token in checked:
            if token >= self.info.vocab_size:
                raise RequestError(f"{name} names token id {token}; the vocabulary has {self.info.vocab_size} tokens", param=name)
        return checked

    # ------------------------------------------------------------------ request -> answers

    def stream(self, prepared: Prepared) -> Iterator[Response]:
        """Increments of the answer(s), as they come; closing the iterator aborts the request."""
        yield from self.stream_many([prepared])

    def stream_many(self, requests: list[Prepared], window: int = 1024, patience: float = 0.0) -> Iterator[Response]:
        """Increments of many requests at once; `Response.session_id` is the request's place in the list, `.index` the answer's.

        `patience`: seconds for which the tokens of an increment may gather; reading whole answers in this way leaves the processor to the engine.

        At most `window` requests, and no more than half of the engine's queue, are in flight: any number may be given, none is refused.
        """
        inbox = ThreadSink(patience)
        open_answers: dict[int, tuple[int, dict[int, Answer]]] = {}
        waiting = deque(enumerate(requests))
        try:
            while True:
                while waiting and len(open_answers) < window and (not open_answers or self._in_flight + waiting[0][1].n <= self._room):
                    place, prepared = waiting.popleft()
                    answers = answers_to(prepared, self.tokenizer)  # before the request is out: it may raise
                    open_answers[self._submit(prepared, inbox)] = (place, answers)
                if not open_answers:
                    return
                for output in inbox.take(sum(len(answers) for _, answers in open_answers.values())):
                    if output.request_id not in open_answers:
                        continue  # another reader's, or late output of an answer that a stop word ended
                    place, answers = open_answers[output.request_id]
                    response = self._advance(output, answers)
                    if not answers:
                        self._drop(output.request_id, finished=output.finish_reason is not None)
                        del open_answers[output.request_id]
                    if response is not None:
                        response.session_id = place
                        yield response
        finally:
            for request_id in open_answers:
                self._drop(request_id, finished=False)

    def generate(self, prepared: Prepared) -> list[Response]:
        """The n complete answers."""
        with contextlib.closing(self.stream_many([prepared], patience=PATIENCE)) as increments:  # type: ignore[type-var]  # Ctrl-C aborts at once
            return merge_increments(increments, prepared.n)

    async def astream(self, prepared: Prepared, deadline: float | None = None, began: Callable[[int], None] | None = None) -> AsyncGenerator[Response, None]:
        """Increments of the answer(s); closing the generator (client gone) aborts the request and frees its blocks. `began` is told the request's id.

        To a reader that is slower than the engine, what has come meanwhile is given as one increment per answer. At `deadline` (of
        time.monotonic()) the answers that are not complete end with the error 'timeout'.
        """
        sink = AsyncSink()
        answers = answers_to(prepared, self.tokenizer)
        request_id = self._submit(prepared, sink)
        if began is not None:
            began(request_id)
        timer = None if deadline is None else sink.reader.call_later(deadline - time.monotonic(), self._expire, request_id, prepared.n, sink)
        finished = False
        try:
            while answers:
                increments: list[Response] = []
                for output in await sink.take():
                    response = self._advance(output, answers)
                    if response is not None:
                        increments.append(response)
                    if not answers:
                        finished = output.finish_reason is not None
                        break  # what follows is late output of answers that stop words ended
                for response in increments if len(increments) < 2 else joined(increments):
                    yield response
        finally:
            if timer is not None:
                timer.cancel()
            self._drop(request_id, finished=finished)

    def _expire(self, request_id: int, n: int, sink: AsyncSink) -> None:
        """Time is up: the engine stops, and whoever reads is told so even if the engine does not answer any more."""
        self.client.abort(request_id)
        for index in range(n):
            error = EngineOutput(
                request_id=request_id, index=index, finish_reason="error", error="the request took longer than the server allows", error_code="timeout"
            )
            sink.put(error)

    async def agenerate(self, prepared: Prepared) -> list[Response]:
        """The n complete answers."""
        merged = Merger(prepared.n)
        async with contextlib.aclosing(self.astream(prepared)) as increments:
            async for response in increments:
                merged.add(response)
        return merged.answers

    def abort_all(self) -> None:
        """Stop every request in flight; their readers get finish_reason 'abort'."""
        for request_id in list(self._sinks):
            self.client.abort(request_id)

    def close(self) -> None:
        """Stop the engine and free its memory. Later requests raise EngineError."""
        self._closer()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _submit(self, prepared: Prepared, sink: Sink) -> int:
        if self.client.failure:
            raise EngineError(f"the engine has stopped: {self.client.failure}")
        if self._asleep:
            raise EngineError("the engine sleeps; wake it first", code="asleep")
        request_id = next(self._ids)
        with self._counting:
            self._sinks[request_id] = (sink, prepared.n)
            self._in_flight += prepared.n
        try:
            self.client.submit(
                EngineRequest(
                    request_id=request_id,
                    token_ids=prepared.token_ids,
                    sampling=prepared.sampling,
                    n=prepared.n,
                    rope_length=prepared.rope_length,
                    cache_salt=prepared.cache_salt,
                    owner=prepared.owner,
                    pictures=prepared.pictures,
                )
            )
        except BaseException:
            self._forget(request_id)
            raise
        return request_id

    def _advance(self, output: EngineOutput, answers: dict[int, Answer]) -> Response | None:
        """Feed one engine output; an answer that ended leaves `answers`. An error of the whole request ends all of them."""
        answer = answers.get(output.index)
        if answer is None:
            return None
        response = answer.feed(output)
        if answer.finished:
            del answers[output.index]
            if output.finish_reason is None and answers:  # a stop word ended it; the others go on
                self.client.abort(output.request_id, output.index)
        return response

    def _drop(self, request_id: int, *, finished: bool) -> None:
        if self._forget(request_id) and not finished:
            self.client.abort(request_id)

    def _forget(self, request_id: int) -> bool:
        """Expect no more outputs of a request; False when it was forgotten before."""
        with self._counting:
            _, count = self._sinks.pop(request_id, (None, 0))
            self._in_flight -= count
        return count > 0

    def _on_outputs(self, outputs: StepOutputs) -> None:
        """Listener, on the engine client's thread."""
        for request_id in deliver(outputs, self._sinks):
            self._drop(request_id, finished=False)


def template_by_name(name: str) -> ChatTemplateConfig | None:
    """The old `model_name`: a built-in template's name selects it, any other name is only a label (as it always was)."""
    from lmdeploy.text.chat_template import list_templates

    return ChatTemplateConfig(model_name=name) if name in list_templates() else None


def _start_client(folder: Path, config: EngineConfig, separate_process: bool, supervision: Supervision | None) -> EngineClient:
    if separate_process:
        return SupervisedEngine(folder, config, supervision)
    from lmdeploy.engine.client import EngineThread
    from lmdeploy.engine.start import build_engine

    return EngineThread(lambda: build_engine(folder, config))


def _close(client: EngineClient, grammars: GrammarChecker) -> None:
    grammars.close()
    client.close()


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
