"""`Scheduler`: who computes what in the next step, and what a step's result means for each answer.

One rule: `num_computed` of every sequence catches up with its `num_tokens`, within `max_prefill_token_num` tokens a step and
`max_batch_size` slots; running sequences first, then waiting ones, both in order of arrival. There is no prefill and no decode
phase. Where few prompts come to answers that are being written, a step is filled up only as far as that costs little (`Fill`).
When blocks run out, the sequence that arrived last loses its own and is computed again later, so the oldest always
progresses. `schedule` may be called again before the result of the last plan is known (see `Sequence`).
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial

import msgspec
import numpy as np

from lmdeploy.engine.blocks import BlockPool
from lmdeploy.engine.outputs import final_output, step_output
from lmdeploy.engine.plan import ENDED, NOTHING_MORE, Items, NewSequence, PlanItem, SlotResult, StepPlan, StepResult
from lmdeploy.engine.prefix_cache import PrefixCache, RootKey
from lmdeploy.engine.running import Running, Stamp
from lmdeploy.engine.sequence import Sequence
from lmdeploy.messages import EngineOutput, EngineRequest, EngineStats, FinishReason, StepOutputs


@dataclass(frozen=True, slots=True)
class Fill:
    """Tokens of prompts beside so many answers that get their next token, ascending, while no more than `most` tokens of prompts could be computed.

    Up to a number of rows a step costs hardly more than reading the weights: prompts that are spread over such steps take less time in all, and make no answer
    wait long. Many prompts are computed at once instead: what they fill up with soon outweighs it.
    """

    beside: tuple[tuple[int, int], ...]
    most: int


NO_TOKEN = "no token can be chosen: the logits are not numbers, or every token is forbidden"  # noqa: S105
#: waiting requests that are counted, at most; more are many
COUNTED = 32


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The resolved numbers that bound a schedule; defaults live in EngineConfig."""

    num_blocks: int
    block_size: int
    max_batch_size: int
    max_prefill_token_num: int
    session_len: int
    enable_prefix_caching: bool
    rope_depends_on_length: bool
    fill: Fill | None = None

    @property
    def max_tokens(self) -> int:
        """Longest prompt + answer: what the options and the whole pool allow."""
        return min(self.session_len, self.num_blocks * self.block_size)


@dataclass(slots=True)
class Counts:
    """Totals since the start, named as in `EngineStats`."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    late_tokens: int = 0
    preemptions: int = 0
    aborted: int = 0
    finished: int = 0
    failed: int = 0


class Scheduler:
    """Owns all sequences and blocks."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.counts = Counts()
        self.pool = BlockPool(limits.num_blocks)
        self.cache = PrefixCache(self.pool, limits.block_size) if limits.enable_prefix_caching else None
        self._requests: dict[int, list[Sequence]] = {}  # unfinished answers of each request
        self._num_unfinished = 0
        self._running = Running(limits.max_batch_size, limits.block_size)
        self._waiting: list[tuple[int, Sequence]] = []  # a heap by arrival; may hold sequences that have ended
        self._sharers: list[Sequence] = []  # waiting, yet holding blocks of their leader's prompt
        self._released: list[int] = []  # slots that the rank has not been told to forget
        self._flights: deque[tuple[StepPlan, Stamp]] = deque()  # plans whose results are not known, and who had their slots then
        self._next_arrival = 0
        self._next_step = 0
        self._published_at = 0  # number of results after which full blocks were published

    # ------------------------------------------------------------------ requests

    @property
    def has_unfinished(self) -> bool:
        """Whether an answer is waiting or running."""
        return self._num_unfinished > 0

    @property
    def unfinished(self) -> list[int]:
        """Ids of the requests that have not ended."""
        return list(self._requests)

    @property
    def num_waiting(self) -> int:
        """Answers without a slot."""
        return self._num_unfinished - len(self._running)

    def add(self, request: EngineRequest, compiled: object = None) -> None:
        """Queue all answers of a checked request. Where the prompt fills a block, answers 1.. wait for answer 0 to compute it.

        `compiled`: something that has to be kept for as long as an answer may need it on the rank.
        """
        assert request.request_id not in self._requests, f"request_id={request.request_id} is in use"
        sequences = [self._new_sequence(request, index) for index in range(request.n)]
        for seq in sequences:
            seq.compiled = compiled
        self._requests[request.request_id] = sequences
        self._num_unfinished += len(sequences)
        leader = sequences[0]
        if self._shared_blocks(leader) and not leader.wants_rows:
            leader.siblings = sequences[1:]
            self._wait(leader)
        else:
            for seq in sequences:
                self._wait(seq)

    def abort(self, request_id: int, index: int | None = None) -> list[EngineOutput]:
        """End all unfinished answers of a request, or answer `index` alone, and free their blocks at once; results in flight for them are ignored."""
        sequences = self._requests.get(request_id, [])
        outputs = []
        for seq in [s for s in sequences if index is None or s.index == index]:
            if index is None:
                seq.siblings = []
            for leader in sequences:
                if seq in leader.siblings:
                    leader.siblings.remove(seq)
            self._end(seq)
            outputs.append(final_output(seq, "abort"))
        self.counts.aborted += len(outputs)
        if len(self._waiting) > 64 + 2 * self.num_waiting:  # mostly ended ones: many clients have gone
            self._waiting = [entry for entry in self._waiting if not entry[1].ended]
            heapq.heapify(self._waiting)
        return outputs

    def _new_sequence(self, request: EngineRequest, index: int) -> Sequence:
        sampling = request.sampling
        if index:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
        max_tokens = min(len(request.token_ids) + sampling.max_new_tokens, self.limits.max_tokens)
        self._next_arrival += 1
        rope_length = (request.rope_length or len(request.token_ids)) if self.limits.rope_depends_on_length else 0
        return Sequence(request, index, self._next_arrival, sampling, max_tokens, RootKey(request.cache_salt, rope_length))

    def _wait(self, seq: Sequence) -> None:
        heapq.heappush(self._waiting, (seq.arrival, seq))

    # ------------------------------------------------------------------ scheduling

    def schedule(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute before results are seen."""
        new: list[NewSequence] = []
        if not self._waiting and (again := self._running.go_on(self.limits.max_prefill_token_num)) is not None:
            return self._launch(new, again)
        items, budget = self._schedule_running()
        if self._waiting and (started := self._schedule_waiting(budget - int(items.counts.sum()))):
            new = [sequence for sequence, _ in started]
            items = items.joined([item for _, item in started])
        return self._launch(new, items) if len(items) else None

    def _launch(self, new: list[NewSequence], items: Items) -> StepPlan:
        """The plan of these items; it counts as in flight."""
        plan = StepPlan(self._next_step, self._released, new, items)
        self._released = []
        self._next_step += 1
        self._flights.append((plan, self._running.stamp(items)))
        return plan

    def _budget(self, decodes: int, unread: int) -> int:
        """Tokens of a step, of which `decodes` running sequences take one each; the prompts of others still have `unread`."""
        fill, most = self.limits.fill, self.limits.max_prefill_token_num
        if fill is None or not decodes:
            return most
        if self._waiting and self._running.has_room:
            if len(self._waiting) > COUNTED:
                return most
            unread += sum(seq.num_tokens - seq.num_computed for _, seq in self._waiting if not seq.ended)
        if unread <= fill.most:
            for answers, tokens in fill.beside:
                if decodes <= answers:
                    return min(most, decodes + tokens)
        return most

    def _schedule_running(self) -> tuple[Items, int]:
        """Items for running sequences, oldest first, and the step's budget."""
        running = self._running
        if not running:
            return Items.of(()), self._budget(0, 0)
        items, lacking, budget = running.shares(self._budget, self.pool.num_free)
        if lacking:
            while (missing := sum(count for row, count in lacking if row < len(running))) > self.pool.num_free:
                self._give_way()
            items.new_blocks = running.hand_out(lacking, self.pool.allocate(missing))
        if len(running) < len(items) or not (items.again or items.counts.all()):
            items = items.take(np.flatnonzero(items.counts[: len(running)]))  # pre-emption shortens the list from its end
        running.count_as_computed(items)
        return items, budget

    def _schedule_waiting(self, budget: int) -> list[tuple[NewSequence, Items]]:
        """Start waiting sequences in order of arrival while budget, slots and blocks last."""
        started = []
        while budget > 0 and self._running.has_room and (seq := self._first_waiting()) is not None:
            if not self._take_blocks(seq):
                break
            heapq.heappop(self._waiting)
            self._running.enter(seq)
            new, items = self._new_on_rank(seq), self._next_of(seq, budget)
            started.append((new, items))
            budget -= items.counts.item(0)
        return started

    def _next_of(self, seq: Sequence, budget: int) -> Items:
        items = self._running.next_of(seq, min(budget, seq.num_tokens - seq.num_computed))
        self._running.count_as_computed(items)
        return items

    def _first_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].ended:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _take_blocks(self, seq: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens, known prefixes first; False when there is no room yet.

        One block for each running sequence must be left, or the newcomer would be pre-empted soon after it was computed.
        """
        pool, size = self.pool, self.limits.block_size
        if seq.retry_version == pool.version:
            return False  # nothing was released since
        shares = bool(seq.blocks)
        self._publish_running()
        hits, node = ([], None) if shares or self.cache is None else self.cache.match(seq.root_key, partial(seq.content, size=size), seq.max_reusable)
        missing = -(-seq.num_tokens // size) - len(seq.blocks) - len(hits)
        room = pool.num_free - sum(pool.references(block) == 0 for block in hits)
        if self._running and room < missing + len(self._running):
            seq.retry_version = pool.version
            return False
        if shares:
            self._sharers.remove(seq)
        else:
            pool.acquire(hits)
            seq.blocks, seq.node, seq.num_published = hits, node, len(hits)
            seq.num_computed = seq.num_done = len(hits) * size
        while pool.num_free < missing:  # nothing runs, so only answers that wait with shared blocks can hold any
            self._unshare(self._sharers[-1])
        seq.blocks += pool.allocate(missing)
        if seq.num_cached < 0:
            seq.num_cached = seq.num_done
            seq.queue_seconds = time.monotonic() - seq.created
            self.counts.prompt_tokens += seq.prompt_len
            self.counts.cached_tokens += seq.num_done
        return True

    def _give_way(self) -> None:
        """Free blocks for running sequences, at the cost of the last arrived, which may be one of them."""
        if self._sharers:
            self._unshare(self._sharers[-1])
        else:
            self._preempt(self._running[-1])

    def _preempt(self, seq: Sequence) -> None:
        """Back to the waiting ones, to be computed again; its full blocks stay in the prefix cache while nobody needs them."""
        self.counts.preemptions += 1
        self._leave(seq)
        self._wait(seq)

    def _unshare(self, seq: Sequence) -> None:
        """Take back the blocks of its leader's prompt from a waiting answer."""
        self._sharers.remove(seq)
        self.pool.release(seq.blocks)
        seq.blocks = []
        seq.num_done = seq.num_computed = 0

    def _leave(self, seq: Sequence) -> None:
        """Give back slot and blocks; what is in flight for the sequence becomes void."""
        self._released.append(seq.slot)
        self._running.write_down()
        self._publish(seq)
        self.pool.release(seq.blocks)
        seq.blocks = []
        seq.node, seq.num_published = None, 0
        self._running.leave(seq)

    def _new_on_rank(self, seq: Sequence) -> NewSequence:
        assert seq.num_pending == 0
        rope_length = seq.request.rope_length or len(seq.request.token_ids)
        return NewSequence(seq.slot, seq.token_ids, seq.prompt_len, seq.sampling, rope_length, seq.request.pictures)

    # ------------------------------------------------------------------ results

    def update(self, plan: StepPlan, result: StepResult) -> StepOutputs:
        """Take in the result of the oldest plan in flight."""
        launched, stamp = self._flights.popleft()
        assert launched is plan and result.step == plan.step and len(result.tokens) == len(plan.items.slots), "results must come in the order of the plans"
        self.counts.steps += 1
        items = plan.items
        outputs, rows, late = self._running.take_tokens(items, result, stamp)
        self.counts.generated_tokens += len(outputs.token_ids)
        if late.size:
            self.counts.late_tokens += late.size
            behind = self._flights[0][0]
            behind.items, prompts = self._running.put_off(items, late, behind.items)
            for seq in prompts:
                self._offer(seq)
        if items.new_blocks:
            self._publish_running()  # those who needed a block have filled one
        for row in rows:
            output = self._take_result(self._running.at(items.slots.item(row)), items[row], result.tokens.item(row), result.more.get(row, NOTHING_MORE))
            if output is not None:
                outputs.others.append(output)
        return outputs

    def _take_result(self, seq: Sequence, item: PlanItem, token: int, more: SlotResult) -> EngineOutput | None:
        if token == ENDED:  # the one before was its last
            self.counts.finished += 1
            self._end(seq)
            return final_output(seq, "stop")
        if more.error is not None or (item.sample and token < 0):
            return self._fail(seq, more.error or NO_TOKEN, more.error_code)
        assert item.sample or token < 0, f"slot {item.slot}: token {token}, though it was not to be sampled"
        seq.num_done = item.start + item.num_tokens
        self._offer(seq)
        if not item.sample:
            reason: FinishReason | None = "length" if seq.sampling.max_new_tokens == 0 and seq.num_done == seq.prompt_len else None
        else:
            seq.num_pending -= 1
            seq.append(token)
            self.counts.generated_tokens += 1
            reason = "stop" if more.complete else self._finish_reason(seq, token)
        output = step_output(seq, item, token, more, reason)
        if reason is not None:
            self.counts.finished += 1
            self._end(seq)
        return output

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        if token_id in seq.stop_ids and seq.num_generated > seq.sampling.min_new_tokens:
            return "stop"
        return "length" if seq.num_known >= seq.max_tokens else None

    def _offer(self, seq: Sequence) -> None:
        """Let others have what is now certain of a prompt."""
        self._publish(seq)
        if seq.siblings and seq.num_done // self.limits.block_size >= self._shared_blocks(seq):
            self._share(seq)

    def _publish_running(self) -> None:
        """Offer what running sequences have added since: before the prefix cache is asked, so that it need not be done in each step."""
        if self.cache is not None and self._published_at != self.counts.steps:
            self._published_at = self.counts.steps
            for seq in self._running.unpublished():
                self._publish(seq)

    def _publish(self, seq: Sequence) -> None:
        """Offer the full blocks that are now certain to the prefix cache."""
        cache, size = self.cache, self.limits.block_size
        known, full = seq.num_published, seq.num_done // size
        if cache is None or known >= full:
            return
        node = seq.node
        while known < full:
            node = cache.publish(seq.root_key, node, seq.content(known, size), seq.blocks[known])
            # its prefix was someone else's copy and has been evicted: publish our own from the start
            known = 0 if node is None else known + 1
        seq.node, seq.num_published = node, known

    def _shared_blocks(self, seq: Sequence) -> int:
        """Blocks of the prompt that the answers of one request share: full ones, without the last token."""
        return (seq.prompt_len - 1) // self.limits.block_size

    def _share(self, leader: Sequence) -> None:
        """Its siblings start with the computed blocks of the prompt; each then computes the rest of the prompt itself."""
        count = self._shared_blocks(leader)
        for seq in leader.siblings:
            seq.blocks = leader.blocks[:count]
            self.pool.acquire(seq.blocks)
            seq.num_done = seq.num_computed = count * self.limits.block_size
            seq.num_cached = leader.num_cached
            self._sharers.append(seq)
            self._wait(seq)
        leader.siblings = []

    def _end(self, seq: Sequence) -> None:
        """Forget a sequence; if others waited for its prompt, the next of them computes it."""
        assert not seq.ended
        if seq.slot >= 0:
            self._leave(seq)
        elif seq.blocks:
            self._unshare(seq)
        if seq.siblings:
            seq.siblings[0].siblings = seq.siblings[1:]
            self._wait(seq.siblings[0])
        seq.siblings = []
        seq.ended = True
        self._num_unfinished -= 1
        unfinished = self._requests[seq.request.request_id]
        unfinished.remove(seq)
        if not unfinished:
            del self._requests[seq.request.request_id]

    def _fail(self, seq: Sequence, message: str, code: str = "step_failed") -> EngineOutput:
        self.counts.failed += 1
        self._end(seq)
        return final_output(seq, "error", message, code)

    def forget_prefixes(self) -> None:
        """What was computed is void: other weights, or no cache. Nothing may be running."""
        assert not self.has_unfinished
        if self.cache is not None:
            self.cache.clear()

    # ------------------------------------------------------------------ failed steps

    def rollback(self) -> list[Sequence]:
        """Forget all plans in flight, as their results will not come; returns the sequences in them that still run, oldest first."""
        held: set[int] = set()
        released: list[int] = []
        for plan, stamp in self._flights:
            released += plan.released
            held.update(plan.items.slots[self._running.remaining(plan.items, stamp)].tolist())
        self._flights.clear()
        self._released = list(dict.fromkeys(released + self._released))  # the rank may not have seen them
        self._running.unsettle()
        found = [seq for seq in self._running if seq.slot in held]
        for seq in found:
            seq.num_computed, seq.num_pending = seq.num_done, 0
        return found

    def solo_plan(self, seq: Sequence) -> StepPlan:
        """The next step of one running sequence alone, telling the rank everything about it again."""
        self._released = list(dict.fromkeys([*self._released, seq.slot]))
        new = self._new_on_rank(seq)
        return self._launch([new], self._next_of(seq, self.limits.max_prefill_token_num))

    def fail(self, seq: Sequence, message: str) -> list[EngineOutput]:
        """The step of the solo plan of `seq` failed too: the sequence ends with an error."""
        released = self._flights.pop()[0].released
        assert not self._flights
        self._released = list(dict.fromkeys(released + self._released))
        return [self._fail(seq, message)]

    # ------------------------------------------------------------------ looking in

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        return EngineStats(
            running=len(self._running),
            waiting=self.num_waiting,
            num_blocks=self.pool.num_blocks,
            used_blocks=self.pool.num_used,
            cached_blocks=self.pool.num_idle,
            **asdict(self.counts),
        )

    def check_integrity(self) -> None:
        """Every block, slot and count is where it should be; for tests and for debugging (slow)."""
        self._running.write_down()
        live = [seq for sequences in self._requests.values() for seq in sequences]
        assert len(live) == self._num_unfinished and not any(seq.ended for seq in live)
        self.pool.check_integrity(block for seq in live for block in seq.blocks)
        if self.cache is not None:
            self.cache.check_integrity()
        self._running.check_integrity([(plan.items, stamp) for plan, stamp in self._flights])
        running = list(self._running)
        waiting = [seq for _, seq in self._waiting if not seq.ended]
        held = [sibling for seq in live for sibling in seq.siblings]
        assert sorted(s.arrival for s in running + waiting + held) == sorted(s.arrival for s in live), "a sequence is nowhere or twice"
        assert {s.arrival for s in self._sharers} == {s.arrival for s in waiting if s.blocks}
        for seq in live:
            self._check_sequence(seq)

    def _check_sequence(self, seq: Sequence) -> None:
        size = self.limits.block_size
        assert 0 <= seq.num_done <= seq.num_computed <= seq.num_tokens <= seq.max_tokens + 1, f"counts of {seq.arrival}"
        assert seq.num_done < seq.num_tokens or seq.sampling.max_new_tokens == 0
        assert len(seq.blocks) * size >= seq.num_computed and len(set(seq.blocks)) == len(seq.blocks)
        assert self._flights or (seq.num_computed == seq.num_done and seq.num_pending == 0)
        for block in seq.blocks[seq.num_done // size :]:  # will be written
            assert self.pool.references(block) == 1 and not self.pool.is_cached(block), f"block {block} of {seq.arrival} is not private"
