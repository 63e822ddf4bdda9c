"""`Engine`: scheduler plus executor; synchronous, token ids only, used by one thread.

It checks requests at the door, drives steps, and keeps failures apart: when a step raises, its sequences are computed again
one by one, and only those that fail alone end with an error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import numpy as np

from lmdeploy.config import MAX_LOGPROBS, MAX_N
from lmdeploy.engine.executor.contract import Executor
from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.engine.preparing import Grammars, Preparing
from lmdeploy.engine.scheduler import Fill, Scheduler, SchedulerLimits
from lmdeploy.errors import EngineError, OverloadedError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, Order, StepOutputs

logger = get_logger(__name__)

RATE_SECONDS = 5.0


class Engine:
    """Continuous batching over one executor. `run_ahead`: plans launched before the result of the one before is seen (0 or 1)."""

    def __init__(
        self,
        executor: Executor,
        *,
        max_prefill_token_num: int,
        max_waiting: int,
        enable_prefix_caching: bool,
        rope_depends_on_length: bool,
        run_ahead: int = 0,
        grammars: Grammars | None = None,
        fill: Fill | None = None,
    ) -> None:
        assert run_ahead in (0, 1), f"run_ahead={run_ahead}"
        info = executor.info
        limits = SchedulerLimits(
            num_blocks=info.memory.num_blocks,
            block_size=info.memory.block_size,
            max_batch_size=info.max_batch_size,
            max_prefill_token_num=max_prefill_token_num,
            session_len=info.session_len,
            enable_prefix_caching=enable_prefix_caching,
            rope_depends_on_length=rope_depends_on_length,
            fill=fill,
        )
        self._executor = executor
        self._scheduler = Scheduler(limits)
        self._max_waiting = max_waiting
        self._preparing = Preparing(grammars)
        self._grammars = grammars
        self._run_ahead = run_ahead
        self._in_flight: deque[StepPlan] = deque()  # submitted, result not fetched
        self._outputs: list[EngineOutput] = []  # to be handed out by the next step
        self._rate = _Rate(RATE_SECONDS)
        self._last_step_time = self._step_seconds = 0.0
        self._asleep: frozenset[str] = frozenset()

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model and its memory."""
        return self._executor.info

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, for integrity checks."""
        return self._scheduler

    @property
    def has_work(self) -> bool:
        """True when `step` has something to compute or to hand out."""
        return bool(self._outputs or self._in_flight or self._scheduler.has_unfinished or self._preparing)

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raises RequestError or OverloadedError, and then nothing was queued."""
        if self._asleep:
            raise RequestError(f"the engine sleeps ({' and '.join(sorted(self._asleep))}); wake it first", code="asleep")
        waiting = self._scheduler.num_waiting + len(self._preparing)
        if waiting >= self._max_waiting:
            raise OverloadedError(f"{waiting} requests are waiting and max_waiting={self._max_waiting}; try again later", code="overloaded")
        check_request(request, self.info.vocab_size, self._scheduler.limits.max_tokens)
        if request.sampling.grammar is None:
            self._scheduler.add(request)
        else:
            self._preparing.add(request)

    def abort(self, request_id: int, index: int | None = None) -> None:
        """End a request (or its answer `index`) now and free its blocks; its last outputs come with the next step. Unknown ids are ignored."""
        ended = self._preparing.abort(request_id, index)
        self._outputs += self._scheduler.abort(request_id, index) if ended is None else ended

    def step(self) -> StepOutputs:
        """Compute one step; what it brought each answer. Raises EngineError when the executor is lost."""
        start = time.monotonic()
        ended, self._outputs = self._outputs, []
        if self._preparing:
            ended += self._take_prepared(block=not (ended or self._in_flight or self._scheduler.has_unfinished))
        plan = self._scheduler.schedule()
        assert plan is not None or self._in_flight or not self._scheduler.has_unfinished, "unfinished sequences and nothing to compute"
        try:
            done = self._advance(plan)
        except EngineError:
            raise
        except Exception as e:
            logger.warning("a step failed (%s: %s); its sequences are computed one by one", type(e).__name__, e, exc_info=True)
            outputs = StepOutputs(others=self._isolate())
        else:
            outputs = StepOutputs() if done is None else self._scheduler.update(*done)
        if ended:
            outputs.others[:0] = ended
        self._last_step_time = time.monotonic()
        self._step_seconds = self._last_step_time - start
        self._rate.add(self._last_step_time, self._scheduler.counts.generated_tokens)
        return outputs

    def prepare_ahead(self) -> bool:
        """Use a moment without work; True while there is more to get ready."""
        return self._executor.prepare_ahead()

    def abort_all(self) -> None:
        """End every request."""
        for request_id in [*self._scheduler.unfinished, *self._preparing.unfinished]:
            self.abort(request_id)

    def obey(self, order: Order) -> None:
        """Carry out an order, when there is no work. Raises ConfigError or CheckpointError when it could not be done, and then nothing has changed.

        To wake what does not sleep is allowed at any time and does nothing.
        """
        if order.action == "wake" and not self._asleep:
            return
        assert not self.has_work
        self._scheduler.forget_prefixes()
        self._executor.obey(order)
        self._asleep = order.sleeping_after(self._asleep)

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of now; may be called from any thread."""
        stats = self._scheduler.stats()
        stats.waiting += len(self._preparing)
        stats.last_step_time, stats.step_seconds = self._last_step_time, self._step_seconds
        stats.tokens_per_second = self._rate.value(time.monotonic())
        return stats

    def close(self) -> None:
        """Free everything; may be called twice."""
        self._executor.close()
        if self._grammars is not None:
            self._grammars.close()

    def _take_prepared(self, *, block: bool) -> list[EngineOutput]:
        """Schedule the requests whose grammars have been compiled; the last outputs of those that ended meanwhile."""
        ready, outputs = self._preparing.take_ready(block=block)
        for done in ready:
            self._scheduler.add(done.request, done.compiled)
            for index in done.aborted:
                self._scheduler.abort(done.request.request_id, index)  # their last outputs went out when they were aborted
        return outputs

    def _advance(self, plan: StepPlan | None) -> tuple[StepPlan, StepResult] | None:
        """Launch the plan, and fetch the oldest result unless we may still run ahead of it."""
        if plan is not None:
            self._executor.submit(plan)
            self._in_flight.append(plan)
        if not self._in_flight or (plan is not None and len(self._in_flight) <= self._run_ahead):
            return None
        oldest = self._in_flight.popleft()
        return oldest, self._executor.result()

    def _isolate(self) -> list[EngineOutput]:
        """After a failed step: throw away what is in flight, then compute each of its sequences in a plan of its own."""
        while self._in_flight:
            self._in_flight.popleft()
            try:
                self._executor.result()
            except EngineError:
                raise
            except Exception as e:  # of a plan built on the failed one: it is computed again
                logger.debug("thrown away: %s", e)
        outputs: list[EngineOutput] = []
        for seq in self._scheduler.rollback():
            plan = self._scheduler.solo_plan(seq)
            try:
                self._executor.submit(plan)
                result = self._executor.result()
            except EngineError:
                raise
            except Exception as e:
                logger.warning("request %d answer %d failed: %s: %s", seq.request.request_id, seq.index, type(e).__name__, e, exc_info=True)
                outputs += self._scheduler.fail(seq, f"the step of this request failed: {type(e).__name__}: {e}")
            else:
                outputs += self._scheduler.update(plan, result)
        return outputs


def check_request(request: EngineRequest, vocab_size: int, max_tokens: int) -> None:
    """The checks that need the engine's facts; `max_tokens` is the longest prompt + answer. Raises RequestError."""
    ids, sampling = request.token_ids, request.sampling
    if not ids:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt", code="empty_prompt")
    if not 1 <= request.n <= MAX_N:
        raise RequestError(f"n={request.n} must be in [1, {MAX_N}]", param="n")
    if not _all_known(ids, vocab_size):
        _check_ids("prompt", ids, vocab_size)  # says which
    needed = len(ids) + min(1, sampling.max_new_tokens)
    if needed > max_tokens:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and the answer needs at least {needed - len(ids)}, but session_len and the KV cache allow {max_tokens}; "
            "shorten the prompt, or raise session_len or cache_max_entry_count",
            param="prompt",
            code="context_length_exceeded",
        )
    for name, value in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        limit = min(MAX_LOGPROBS, vocab_size)
        if value is not None and not 0 <= value <= limit:
            raise RequestError(f"{name}={value} must be in [0, {limit}]", param=name)
    if sampling.embed and (sampling.max_new_tokens or request.n != 1):
        raise RequestError(f"an embedding is of the prompt alone: max_new_tokens={sampling.max_new_tokens} must be 0, n={request.n} must be 1", param="n")
    if sampling.max_new_tokens < 0:
        raise RequestError(f"max_new_tokens={sampling.max_new_tokens} must be >= 0", param="max_new_tokens")
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("logit_bias", sampling.logit_bias, vocab_size)
    for word in sampling.bad_words:
        _check_ids("bad_words", word, vocab_size)


def _all_known(ids: list[int], vocab_size: int) -> bool:
    """Whether a prompt's ids are in the vocabulary; as an array, which takes half the time of looking at each."""
    try:
        numbers = np.fromiter(ids, dtype=np.int64, count=len(ids))
    except OverflowError:
        return False
    return bool(numbers.min() >= 0 and numbers.max() < vocab_size)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise RequestError(f"{name}: token id {wrong} is not in the vocabulary (0..{vocab_size - 1})", param=name)


class _Rate:
    """Growth a second of a counter, over the last `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._points: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int) -> None:
        """Note the counter's value, a hundred times in the window at most; points older than that go, but for one at its edge."""
        points = self._points
        if len(points) > 1 and now - points[-2][0] < self._seconds / 100:
            points[-1] = now, count
            return
        points.append((now, count))
        while len(points) > 2 and points[1][0] < now - self._seconds:
            points.popleft()

    def value(self, now: float) -> float:
        """0 when nothing was noted within the window."""
        points = list(self._points)
        if len(points) < 2 or points[-1][0] < now - self._seconds:
            return 0.0
        (t0, c0), (_, c1) = points[0], points[-1]
        return (c1 - c0) / max(now - max(t0, now - self._seconds), 1e-9)
