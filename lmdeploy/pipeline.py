"""The Python API: `pipeline(...)` loads a model, the `Pipeline` answers prompts, one at a time, in batches, streamed or as a chat.

Names, arguments and defaults follow the public surface, old spellings included. A wrong prompt of a batch fails alone (its
`Response` has finish_reason 'error' and says why); a single wrong prompt raises RequestError. All text work is `Frontend`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from lmdeploy import log
from lmdeploy.answer import Merger, Prepared
from lmdeploy.calls import GenConfigs, Prompts, as_batch, as_config, as_turn, id_batch
from lmdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig, TurbomindEngineConfig
from lmdeploy.delivery import PATIENCE
from lmdeploy.errors import ConfigError, RequestError, SessionBusyError
from lmdeploy.frontend import Frontend
from lmdeploy.messages import EngineInfo, MemoryBill, Response
from lmdeploy.prompts import Prompt
from lmdeploy.text.tokenizer import Tokenizer
from lmdeploy.vision.policy import OWN, MediaPolicy

logger = log.get_logger(__name__)

#: a batch of at least this many prompts shows a progress bar by itself
_PROGRESS_FROM = 16


@dataclass(eq=False)
class Session:
    """A conversation: `pipe.chat(prompt, session)` continues it. `history` holds (prompt, answer) pairs."""

    session_id: int
    history: list[tuple[Any, str]] = field(default_factory=list)
    response: Response | None = None
    _pipe: Pipeline | None = field(default=None, repr=False)
    _messages: list[dict[str, Any]] = field(default_factory=list, repr=False)
    _rope_length: int = field(default=0, repr=False)  # the first turn's length fixes a dynamic rope's base
    _busy: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _aborted: bool = field(default=False, repr=False)

    def abort(self) -> None:
        """Stop the answer that is being generated; what came so far stays in the history."""
        self._aborted = True

    def close(self) -> None:
        """Stop a running answer and forget the conversation."""
        self._clear()
        if self._pipe is not None:
            self._pipe._sessions.pop(self.session_id, None)
            self._pipe._kept.pop(self.session_id, None)

    def _clear(self) -> None:
        self._aborted = True
        self.history.clear()
        self._messages = []  # a new list: a turn that still runs sees that its own is no longer the conversation's
        self.response = None
        self._rope_length = 0

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Held while a turn is answered; raises SessionBusyError when one is."""
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError(f"session {self.session_id} is still answering; wait for it or use another session", param="session")
        try:
            self._aborted = False
            yield
        finally:
            self._busy.release()


class Pipeline:
    """A loaded model. Threads may share it; several pipelines live in one process. Close it, or use it as a context manager."""

    def __init__(self, frontend: Frontend, media: MediaPolicy = OWN) -> None:
        self.frontend, self._media = frontend, media
        self._sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
        self._kept: dict[int, Session] = {}  # those that the caller named by a number: nobody else holds them
        self._session_ids = itertools.count(1)

    # ------------------------------------------------------------------ facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.frontend.tokenizer

    @property
    def session_len(self) -> int:
        """Longest prompt + answer, in tokens."""
        return self.frontend.info.session_len

    @property
    def info(self) -> EngineInfo:
        """Limits, kernels, memory and, with a 4-bit KV cache, its measured quality, as they were at start-up."""
        return self.frontend.info

    @property
    def memory(self) -> MemoryBill:
        """Where the memory went, measured at start-up."""
        return self.frontend.info.memory

    # ------------------------------------------------------------------ answers

    def __call__(
        self,
        prompts: Prompts,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        use_tqdm: bool | None = None,
        **old: Any,
    ) -> Response | list[Response]:
        """Answer a prompt (-> Response) or a list of them (-> list, in order).

        A prompt is a text, one conversation (OpenAI messages), token ids or, for a model that sees, (text, image) or (text, [images]) of PIL images,
        paths and URLs; a list of these is a batch. `n` > 1 gives n answers for
        each prompt, side by side in the list. `use_tqdm`: progress bar; not given = for long batches. Raises RequestError.
        `old`: sampling keywords of scripts before 0.6 (request_output_len, top_k, top_p, temperature, repetition_penalty, ignore_eos).
        """
        gen_config, do_preprocess = as_config(gen_config, do_preprocess, old)
        batch, single = as_batch(prompts)
        configs = self._configs(gen_config, len(batch))
        if single:
            prepared = self._prepare(batch[0], configs[0], do_preprocess, adapter_name)
            answers = self.frontend.generate(prepared)
            return answers[0] if configs[0].n == 1 else answers
        prepared_or_error = [self._try_prepare(p, c, do_preprocess, adapter_name) for p, c in zip(batch, configs, strict=True)]
        show = len(batch) >= _PROGRESS_FROM if use_tqdm is None else use_tqdm
        return self._run_batch(prepared_or_error, show)

    infer = __call__

    def batch_infer(
        self,
        prompts: Prompts,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        use_tqdm: bool | None = None,
        **old: Any,
    ) -> Response | list[Response]:
        """The same as calling the pipeline (old name)."""
        return self(prompts, gen_config, do_preprocess, adapter_name, use_tqdm, **old)

    def stream_infer(
        self,
        prompts: Prompts,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        stream_response: bool = True,
        **old: Any,
    ) -> Iterator[Response]:
        """Increments of the answers as they come; `.index` tells the prompt. `stream_response=False`: whole answers as they finish."""
        if old.pop("sessions", None) is not None:
            raise RequestError("sessions: stream_infer keeps no history; use chat(prompt, session, stream_response=True)", param="sessions", code="unsupported")
        gen_config, do_preprocess = as_config(gen_config, do_preprocess, old)
        batch, single = as_batch(prompts)
        configs = self._configs(gen_config, len(batch))
        if any(c.n > 1 for c in configs):
            raise RequestError("n > 1 cannot be streamed: increments name the prompt, not the answer; call the pipeline instead", param="n")
        if single:
            prepared: list[Prepared | Response] = [self._prepare(batch[0], configs[0], do_preprocess, adapter_name)]
        else:
            prepared = [self._try_prepare(p, c, do_preprocess, adapter_name) for p, c in zip(batch, configs, strict=True)]
        increments = self._stream(prepared)
        return increments if stream_response else self._whole(increments, len(batch))

    def chat(
        self,
        prompt: str | list[dict[str, Any]],
        session: Session | int | None = None,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
        stream_response: bool = False,
        adapter_name: str | None = None,
    ) -> Session | Iterator[Response]:
        """One turn of a conversation: answers `prompt` with the session's history before it, and returns the session.

        `session` is None (a new one), a Session, or an id (its history is kept here). `stream_response=True` returns the increments.
        """
        session = self._session(session)
        turn = as_turn(prompt)
        stream = self._turn(session, prompt, turn, gen_config or GenerationConfig(), do_preprocess, adapter_name)
        if stream_response:
            return stream
        for _ in stream:
            pass
        return session

    def session(self) -> Session:
        """A new, empty conversation."""
        return self._session(None)

    async def generate(
        self,
        messages: Prompt,
        session_id: int = -1,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = True,
        sequence_start: bool = True,
        sequence_end: bool = True,
        step: int = 0,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> AsyncIterator[Response]:
        """Async increments. With a `session_id`, `sequence_start=False` continues its history and `sequence_end=False` keeps it."""
        if step:
            raise RequestError(f"step={step}: going back within a session is not available; start a new one", param="step", code="unsupported")
        gen = gen_config or GenerationConfig()
        alone = session_id < 0 or (sequence_start and sequence_end)
        session = Session(-1) if session_id < 0 else self._session(session_id)
        with session._answering():
            if sequence_start:
                session._clear()
                session._aborted = False
            turn = [] if alone else as_turn(messages)
            before = session._messages
            prepared = (
                self._prepare(messages, gen, do_preprocess, adapter_name) if alone else self._prepare_turn(session, turn, gen, do_preprocess, adapter_name)
            )
            merged = Merger(prepared.n)
            async with contextlib.aclosing(self.frontend.astream(prepared)) as increments:
                async for response in increments:
                    merged.add(response)
                    if response.finish_reason is not None and not alone:
                        self._remember(session, before, messages, turn, merged.answers[0])  # before the yield: readers often stop at the last part
                    if stream_response:
                        yield response
                    if session._aborted:
                        break
            answers = merged.complete()
            if not alone:
                self._remember(session, before, messages, turn, answers[0])
            if sequence_end and session_id >= 0:
                session.close()
        for answer in answers if not stream_response else ():
            yield answer

    async def stop_session(self, session_id: int) -> None:
        """Stop the session's running answer."""
        if (session := self._sessions.get(session_id)) is not None:
            session.abort()

    async def end_session(self, session_id: int) -> None:
        """Forget the session."""
        if (session := self._sessions.get(session_id)) is not None:
            session.close()

    # ------------------------------------------------------------------ scores

    def get_ppl(self, input_ids: list[int] | list[list[int]]) -> list[float]:
        """Mean cross-entropy (natural log, not exponentiated) of each sequence; each needs at least 2 tokens."""
        batch = id_batch(input_ids)
        for ids in batch:
            if len(ids) < 2:
                raise RequestError(f"get_ppl needs at least 2 tokens, got {len(ids)}", param="input_ids")
        out = []
        for response in self._score(batch, GenerationConfig(max_new_tokens=1, prompt_logprobs=0)):
            entries = [next(iter(e.values())) for e in response.prompt_logprobs or () if e]
            out.append(-sum(entries) / len(entries))
        return out

    def get_logits(self, input_ids: list[int] | list[list[int]]) -> torch.Tensor | list[torch.Tensor]:
        """Float32 logits at every position: [batch, length, vocabulary] for equal lengths, else a list of [length, vocabulary]."""
        batch = id_batch(input_ids)
        logits = [r.logits for r in self._score(batch, GenerationConfig(max_new_tokens=1, output_logits="all"))]
        return torch.stack(logits) if len({len(x) for x in logits}) == 1 else logits

    def get_reward_score(self, input_ids: list[int] | list[list[int]]) -> list[float]:
        """Scores of a reward model; no reward architecture is supported yet."""
        raise ConfigError(f"{self.frontend.spec.architecture} is not a reward model")

    def _score(self, batch: list[list[int]], gen: GenerationConfig) -> list[Response]:
        prepared = []
        for ids in batch:
            if len(ids) > self.session_len:
                raise RequestError(f"{len(ids)} tokens are more than session_len={self.session_len}", param="input_ids", code="context_length_exceeded")
            one = self.frontend.prepare_score(ids, gen)
            prepared.append(one)
        mergers = [Merger(1) for _ in batch]
        for response in self.frontend.stream_many(prepared):
            mergers[response.session_id].add(response)
        for m in mergers:
            if m.answers[0].error_message:
                raise RequestError(m.answers[0].error_message, param="input_ids")
        return [m.answers[0] for m in mergers]

    # ------------------------------------------------------------------ life

    def sleep(self, level: int = 1) -> None:
        """Give back memory until `wakeup`: level 1 the KV cache and, on a GPU, the weights (they wait in host memory), level 2 both on any device.

        Running requests end first.
        """
        self.frontend.sleep(level, drain_seconds=math.inf)

    def wakeup(self, tags: Iterable[str] = ()) -> None:
        """Bring back what `tags` name ('weights', 'kv_cache'; none = all)."""
        self.frontend.wakeup(tags)

    def update_weights(self, folder: str | os.PathLike[str]) -> None:
        """Serve the weights of a folder of the same model; raises CheckpointError when they do not fit, and keeps the old ones."""
        self.frontend.update_weights(os.fspath(folder), drain_seconds=math.inf)

    def close(self) -> None:
        """Stop the engine and free all its memory."""
        self.frontend.close()
        self._sessions.clear()
        self._kept.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _configs(self, gen_config: GenConfigs, count: int) -> list[GenerationConfig]:
        if isinstance(gen_config, (list, tuple)):
            if len(gen_config) != count:
                raise RequestError(f"gen_config has {len(gen_config)} entries for {count} prompts; give one for each or a single one", param="gen_config")
            return list(gen_config)
        if gen_config is not None and not isinstance(gen_config, GenerationConfig):
            raise RequestError(f"gen_config must be a GenerationConfig, not {type(gen_config).__name__}", param="gen_config")
        return [gen_config or GenerationConfig()] * count

    def _prepare(self, prompt: Prompt, gen: GenerationConfig, do_preprocess: bool, adapter_name: str | None) -> Prepared:
        if adapter_name is not None:
            raise RequestError(f"adapter_name={adapter_name!r}: no adapters are loaded", param="adapter_name", code="unsupported")
        prepared = self.frontend.prepare(prompt, gen, do_preprocess=do_preprocess, media=self._media)
        for notice in prepared.notices:
            logger.warning("%s", notice)
        return prepared

    def _try_prepare(self, prompt: Prompt, gen: GenerationConfig, do_preprocess: bool, adapter_name: str | None) -> Prepared | Response:
        try:
            return self._prepare(prompt, gen, do_preprocess, adapter_name)
        except RequestError as e:
            return Response(text="", generate_token_len=0, input_token_len=0, finish_reason="error", error_code=e.code, error_message=str(e))

    def _stream(self, requests: Sequence[Prepared | Response]) -> Iterator[Response]:
        """Increments; `.index` and `.session_id` are the prompt's place."""
        good: list[tuple[int, Prepared]] = []
        for place, request in enumerate(requests):
            if isinstance(request, Response):
                yield dataclasses.replace(request, index=place, session_id=place)
            else:
                good.append((place, request))
        with contextlib.closing(self.frontend.stream_many([p for _, p in good])) as increments:  # type: ignore[type-var]
            for response in increments:
                response.index = response.session_id = good[response.session_id][0]
                yield response

    def _whole(self, increments: Iterator[Response], count: int) -> Iterator[Response]:
        mergers = [Merger(1) for _ in range(count)]
        for part in increments:
            place = part.index
            mergers[place].add(dataclasses.replace(part, index=0))
            if part.finish_reason is not None:
                answer = mergers[place].answers[0]
                answer.index = place
                yield answer

    def _run_batch(self, requests: Sequence[Prepared | Response], show: bool) -> list[Response]:
        sizes = [1 if isinstance(r, Response) else r.n for r in requests]
        mergers = [Merger(n) for n in sizes]
        good = [(place, r) for place, r in enumerate(requests) if isinstance(r, Prepared)]
        for place, r in enumerate(requests):
            if isinstance(r, Response):
                mergers[place].answers[0] = dataclasses.replace(r, session_id=place)
        with (
            tqdm(total=sum(r.n for _, r in good), desc="answers", disable=not show) as bar,
            contextlib.closing(self.frontend.stream_many([r for _, r in good], patience=PATIENCE)) as increments,  # type: ignore[type-var]  # Ctrl-C aborts at once
        ):
            for part in increments:
                place = good[part.session_id][0]
                part.session_id = place
                mergers[place].add(part)
                bar.update(part.finish_reason is not None)
        answers = [answer for merger in mergers for answer in merger.answers]
        for place, answer in enumerate(answers):
            answer.index = place
        return answers

    def _session(self, session: Session | int | None) -> Session:
        if isinstance(session, Session):
            return session
        if session is not None and (not isinstance(session, int) or isinstance(session, bool)):
            raise RequestError(f"session must be a Session, a number or None, not {session!r:.80}", param="session")
        if session is None or session < 0:
            number = next(i for i in self._session_ids if i not in self._sessions)
            return self._sessions.setdefault(number, Session(number, _pipe=self))
        return self._kept.setdefault(session, self._sessions.setdefault(session, Session(session, _pipe=self)))

    def _prepare_turn(self, session: Session, turn: list[dict[str, Any]], gen: GenerationConfig, do_preprocess: bool, adapter_name: str | None) -> Prepared:
        if gen.n > 1:
            raise RequestError(f"n={gen.n}: a conversation continues with one answer; use n=1", param="n")
        prompt: Prompt = [*session._messages, *turn]
        if not do_preprocess:
            prompt = "".join(str(m.get("content") or "") for m in prompt)  # type: ignore[union-attr]
        prepared = self._prepare(prompt, gen, do_preprocess, adapter_name)
        session._rope_length = session._rope_length or len(prepared.token_ids)
        return dataclasses.replace(prepared, rope_length=session._rope_length)

    def _remember(self, session: Session, before: list[dict[str, Any]], prompt: Any, turn: list[dict[str, Any]], answer: Response) -> None:
        """Make the turn history; once, and not when it failed or the session was closed meanwhile (`before` is its list no more)."""
        if session.response is answer or session._messages is not before:
            return
        answer.session_id = session.session_id
        session.response = answer
        if answer.finish_reason != "error":
            session._messages += [*turn, {"role": "assistant", "content": answer.text}]
            session.history.append((prompt, answer.text))

    def _turn(
        self, session: Session, prompt: Any, turn: list[dict[str, Any]], gen: GenerationConfig, do_preprocess: bool, adapter_name: str | None
    ) -> Iterator[Response]:
        with session._answering():
            before = session._messages
            prepared = self._prepare_turn(session, turn, gen, do_preprocess, adapter_name)
            merged = Merger(1)
            with contextlib.closing(self.frontend.stream(prepared)) as increments:  # type: ignore[type-var]
                for part in increments:
                    merged.add(part)
                    if part.finish_reason is not None:
                        self._remember(session, before, prompt, turn, merged.answers[0])  # before the yield: readers often stop at the last part
                    yield part
                    if session._aborted:
                        break
            self._remember(session, before, prompt, turn, merged.complete()[0])


def pipeline(
    model_path: str | None = None,
    backend_config: EngineConfig | str | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool = False,
    speculative_config: Any = None,
    *,
    model_name: str | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Load a model and return its Pipeline.

    `model_path`: a folder, a hub id, or None for the embedded tiny model. `backend_config`: TurbomindEngineConfig (fast kernels, the default) or
    PytorchEngineConfig. `model_name`: a built-in chat template's name (old API; it may also stand in second place). Further keywords are
    engine options, as they once were accepted. Raises ConfigError, CheckpointError or EngineError, one clear line each.
    """
    if not isinstance(log_level, str) or log_level.upper() not in log.LEVELS:
        raise ConfigError(f"log_level={log_level!r:.80} is not one of {', '.join(log.LEVELS)}")
    log.setup(log_level)
    if max_log_len is not None:
        logger.warning("max_log_len=%r has no effect: pipeline() never logs prompts", max_log_len)
    if isinstance(backend_config, str):  # pipeline(path, model_name) of old scripts
        model_name, backend_config = backend_config, None
    if backend_config is not None and not isinstance(backend_config, EngineConfig):
        raise ConfigError(f"backend_config must be a TurbomindEngineConfig or PytorchEngineConfig, not {type(backend_config).__name__}")
    if speculative_config is not None:
        raise ConfigError("speculative_config: speculative decoding is not available in this version of lmdeploy; leave it out")
    if trust_remote_code:
        logger.warning("trust_remote_code has no effect: lmdeploy never runs code from a checkpoint")
    vision, domains = kwargs.pop("vision_config", None), kwargs.pop("allowed_media_domains", None)
    config = backend_config or TurbomindEngineConfig()
    if vision is not None:
        config = config.replace(vision_max_batch_size=vision.max_batch_size)
    if kwargs:
        logger.warning("engine options given to pipeline() directly (%s): better in TurbomindEngineConfig(...)", ", ".join(sorted(kwargs)))
        config = config.replace(**kwargs)
    if model_name is not None and config.model_name is None:
        config = config.replace(model_name=model_name)
    if model_path is None:
        logger.warning("no model given: using the embedded tiny demo model")
    frontend = Frontend.open(model_path, config, chat_template_config, model_name=model_name)
    return Pipeline(frontend, OWN if domains is None else dataclasses.replace(OWN, allowed_domains=tuple(domains)))
