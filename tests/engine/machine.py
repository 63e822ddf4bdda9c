"""Random requests, aborts, failures, late tokens and ends that are said late against the whole of scheduler and engine, judged by the fake rank and by arithmetic.

The outcome of every answer is computed in advance from its prompt alone. So whatever the pool, the batch, the budget, shared
prefixes, pre-emption, failed steps of others, running ahead or lateness do, an answer that is not aborted must be exactly that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from unittest import mock

import hypothesis.strategies as st
import msgspec
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmdeploy.engine import running
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.scheduler import Fill
from lmdeploy.errors import RequestError
from lmdeploy.messages import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs
from tests.engine.fake_rank import FakeRank, draw, key_chain, next_key

VOCAB = 31
POISON, BAD_DRAW, STOP = 30, 29, 28
#: tokens behind which answers of a run allow nothing; none of them is a stop id
ENDS = (frozenset[int](), frozenset({27}), frozenset({4, 5, 26, 27}), frozenset(range(4, 12)))
#: prompts are these stems, cut anywhere, and a few more tokens: many share prefixes
STEMS = ([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 1, 2], [1, 2, 3, 4, 7, 7, 7, 7, 1, 1, 1, 1, 2, 2, 2, 2], [3] * 16)


@dataclass
class Answer:
    """What must come and what came."""

    token_ids: list[int]
    reason: str
    stop_token_id: int | None = None
    got: list[EngineOutput] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the final output has come."""
        return bool(self.got) and self.got[-1].finish_reason is not None


def outcome(request: EngineRequest, index: int, max_tokens: int, rope_depends_on_length: bool, ends: frozenset[int]) -> Answer:
    """Tokens and finish reason of an answer, from the prompt alone."""
    prompt, sampling = request.token_ids, request.sampling
    if POISON in prompt:
        return Answer([], "error")
    if sampling.max_new_tokens == 0:
        return Answer([], "length")
    key = key_chain(prompt, (request.rope_length or len(prompt)) if rope_depends_on_length else 0)[-1]
    tokens: list[int] = []
    while True:
        token = draw(key, sampling.seed + index, len(tokens), VOCAB)
        if token == BAD_DRAW:
            return Answer(tokens, "error")
        tokens.append(token)
        if token in sampling.stop_token_ids and not sampling.ignore_eos and len(tokens) > sampling.min_new_tokens:
            return Answer(tokens, "stop", token)
        if token in ends:
            return Answer(tokens, "stop")
        if len(tokens) == sampling.max_new_tokens or len(prompt) + len(tokens) == max_tokens:
            return Answer(tokens, "length")
        if token == POISON:
            return Answer(tokens, "error")
        key = next_key(key, token)


@st.composite
def requests(draw_from: st.DrawFn) -> EngineRequest:
    """A prompt with a common stem and any sampling options that the scheduler looks at."""
    stem = draw_from(st.sampled_from(STEMS))
    prompt = stem[: draw_from(st.integers(0, 16))] + draw_from(st.lists(st.integers(0, POISON if draw_from(st.integers(0, 9)) == 9 else 7), max_size=3))
    sampling = SamplingParams(
        max_new_tokens=draw_from(st.integers(0, 14)),
        min_new_tokens=draw_from(st.integers(0, 3)),
        seed=draw_from(st.integers(0, 3)),
        stop_token_ids=draw_from(st.sampled_from([(), (STOP,), (STOP, 1, 2, 3)])),
        ignore_eos=draw_from(st.booleans()),
        logprobs=draw_from(st.sampled_from([None, None, 0])),
        prompt_logprobs=draw_from(st.sampled_from([None, None, None, 0])),
        output_logits=draw_from(st.sampled_from([None, None, None, "all", "generation"])),
    )
    return EngineRequest(
        request_id=0,
        token_ids=prompt or [1],
        sampling=sampling,
        n=draw_from(st.sampled_from([1, 1, 1, 2, 3])),
        rope_length=draw_from(st.sampled_from([0, 0, 5])),
        cache_salt=draw_from(st.sampled_from(["", "", "other"])),
    )


class EngineMachine(RuleBasedStateMachine):
    """Engine + fake rank with tiny pools; integrity is checked after every action."""

    run_ahead = 0

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([1, 2, 3, 4, 4, 8, 16]),
        max_batch_size=st.integers(1, 5),
        budget=st.integers(1, 12),
        session_len=st.integers(10, 40),
        logged=st.integers(1, 5),
        caching=st.booleans(),
        rope=st.booleans(),
        fill=st.none()
        | st.builds(lambda few, tokens, most: Fill(((few, tokens), (few + 2, 1)), most), st.integers(1, 3), st.integers(1, 6), st.integers(1, 30)),
        late=st.sampled_from([0.0, 0.1, 0.3, 0.3, 0.6]),
        ends=st.sampled_from(ENDS),
        seed=st.integers(0, 1000),
    )
    def build(
        self,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        budget: int,
        session_len: int,
        logged: int,
        caching: bool,
        rope: bool,
        fill: Fill | None,
        late: float,
        ends: frozenset[int],
        seed: int,
    ) -> None:
        self.rank = FakeRank(num_blocks, block_size, max_batch_size, session_len, vocab_size=VOCAB, rope_depends_on_length=rope)
        self.rank.poison, self.rank.bad_draw, self.rank.ends = POISON, BAD_DRAW, ends
        luck = Random(seed)
        self.rank.late = lambda slot, place: luck.random() < late
        with mock.patch.object(running, "LOGGED", logged):
            self.engine = Engine(
                self.rank,
                max_prefill_token_num=budget,
                max_waiting=1000,
                enable_prefix_caching=caching,
                rope_depends_on_length=rope,
                run_ahead=self.run_ahead,
                fill=fill,
            )
        self.requests: dict[int, EngineRequest] = {}
        self.answers: dict[tuple[int, int], Answer] = {}
        self.aborted: set[int] = set()

    @rule(request=requests())
    def add(self, request: EngineRequest) -> None:
        scheduler, rank = self.engine.scheduler, self.rank
        request = msgspec.structs.replace(request, request_id=len(self.requests))
        try:
            self.engine.add(request)
        except RequestError as e:
            assert e.code == "context_length_exceeded" and len(request.token_ids) + 1 > scheduler.limits.max_tokens
            return
        self.requests[request.request_id] = request
        for index in range(request.n):
            self.answers[request.request_id, index] = outcome(request, index, scheduler.limits.max_tokens, rank.rope_depends_on_length, rank.ends)

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), request=requests())
    def follow_up(self, data: st.DataObject, request: EngineRequest) -> None:
        """A prompt that begins with an earlier prompt and its answer, as in a conversation."""
        earlier = data.draw(st.sampled_from(sorted(self.answers)))
        tokens = self.requests[earlier[0]].token_ids + self.answers[earlier].token_ids
        self.add(msgspec.structs.replace(request, token_ids=tokens + request.token_ids[-2:]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        index = data.draw(st.none() | st.integers(0, self.requests[request_id].n - 1))
        if any(not a.ended for (r, i), a in self.answers.items() if r == request_id and index in (None, i)):
            self.aborted.add(request_id)
        self.engine.abort(request_id, index)

    @rule(half_applied=st.booleans(), times=st.sampled_from([1, 1, 1, 2]))
    def break_the_next_step(self, half_applied: bool, times: int) -> None:
        """Twice: the step, and the first of its sequences when computed alone, which then ends with an error."""
        self.rank.broken, self.rank.half_applied = times, half_applied

    @precondition(lambda self: self.rank.owes_an_end)
    @rule(half_applied=st.booleans())
    def break_the_step_that_says_an_end(self, half_applied: bool) -> None:
        """The answer is computed anew, alone, and has ended already."""
        self.rank.broken, self.rank.half_applied = 1, half_applied

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.engine.has_work:
                self._step()

    @invariant()
    def everything_is_in_its_place(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        bound = 10 + 20 * sum(len(r.token_ids) + r.sampling.max_new_tokens + 2 for r in self.requests.values() for _ in range(r.n))
        while self.engine.has_work:
            self._step()
            self.engine.scheduler.check_integrity()
            bound -= 1
            assert bound > 0, "no end"
        for (request_id, index), answer in self.answers.items():
            self._judge(self.requests[request_id], index, answer)
        stats = self.engine.stats()
        assert stats.used_blocks == stats.running == stats.waiting == 0
        assert stats.finished + stats.failed + stats.aborted == len(self.answers)
        reasons = Counter(answer.got[-1].finish_reason for answer in self.answers.values())
        assert (stats.failed, stats.aborted) == (reasons["error"], reasons["abort"])
        assert stats.generated_tokens == sum(len(output.token_ids) for answer in self.answers.values() for output in answer.got)

    def _step(self) -> None:
        running = self.engine.scheduler._running
        running.write_down()
        oldest, done = (running[0], running[0].num_done) if running else (None, 0)
        for output in self.engine.step():
            answer = self.answers[output.request_id, output.index]
            assert not answer.ended, "an answer goes on after its end"
            answer.got.append(output)
        if oldest is not None and self.run_ahead == 0:
            running.write_down()
            assert oldest.ended or oldest.num_done > done, "the oldest running sequence did not progress"

    def _judge(self, request: EngineRequest, index: int, answer: Answer) -> None:
        token_ids = [t for o in answer.got for t in o.token_ids]
        last = answer.got[-1]
        assert answer.ended and last.num_generated == len(token_ids) and last.num_prompt == len(request.token_ids)
        if last.finish_reason == "abort":
            assert request.request_id in self.aborted and token_ids == answer.token_ids[: len(token_ids)]
            return
        if last.finish_reason == "error" and "broken step" in str(last.error):
            assert token_ids == answer.token_ids[: len(token_ids)]
            return
        assert (token_ids, last.finish_reason) == (answer.token_ids, answer.reason), f"{request} answer {index}"
        assert last.stop_token_id == answer.stop_token_id
        self._judge_rows(request, answer, token_ids)

    def _judge_rows(self, request: EngineRequest, answer: Answer, token_ids: list[int]) -> None:
        rope = (request.rope_length or len(request.token_ids)) if self.rank.rope_depends_on_length else 0
        keys = key_chain(request.token_ids + token_ids, rope)
        logprobs = [p.token_id for o in answer.got for p in o.logprobs or []]
        assert logprobs == (token_ids if request.sampling.logprobs is not None else [])
        prompt_logprobs = [o.prompt_logprobs for o in answer.got if o.prompt_logprobs is not None]
        if request.sampling.prompt_logprobs is not None and (answer.reason != "error" or token_ids):
            rows = [None, *(TokenLogprobs(t, -float(k % 100), []) for t, k in zip(request.token_ids[1:], keys, strict=False))]
            assert prompt_logprobs == [rows]
        if answer.reason == "error":
            return
        logits = [k for o in answer.got for k in o.logits or []]
        prompt_rows = len(request.token_ids) - (request.sampling.max_new_tokens > 0)
        computed = keys[: prompt_rows + len(token_ids)]
        want = {"all": computed, "generation": computed[prompt_rows:], None: []}
        assert logits == want[request.sampling.output_logits]
