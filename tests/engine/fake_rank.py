"""A rank without a model, and a strict judge of plans: what it computes depends on every key that a real rank would read.

The "keys" of a position are a hash of all tokens up to it. They are stored by block and offset, exactly as told by the plans,
and every key that an item may read is compared with what it must be. So a wrong block, a missing chunk, an overwritten shared
block or a stale prefix hit fails at once. The next token is a hash of the keys, hence of all tokens before.

It can be late with tokens, wherever the contract allows that. Meanwhile it leaves keys of no known token where the next plan says: who reads them fails, too.
As under a grammar, an answer can end with some tokens; where the next plan goes on with it, that is said as late as the contract allows.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from lmdeploy.engine.plan import ENDED, LATE, Items, NewSequence, PlanItem, Rows, StepPlan, StepResult
from lmdeploy.messages import EngineInfo, MemoryBill, TokenLogprobs

MASK = (1 << 61) - 1
#: keys of a token that is not known
GARBAGE = -1


class PoisonError(RuntimeError):
    """A step met a token that breaks it."""


class WrongPlan(BaseException):
    """A plan that no rank could obey; not an Exception, so that no error handling of the engine can hide it."""


def check(fact: bool, message: str) -> None:
    """`assert` that an engine cannot catch."""
    if not fact:
        raise WrongPlan(message)


@dataclass
class Slot:
    """What a rank keeps of a sequence."""

    new: NewSequence
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)  # the right keys of token_ids[:len(keys)]
    over: bool = False  # it was said that it has failed or ended
    owes: bool = False  # the token behind `token_ids`, which was late


def next_key(key: int, token_id: int) -> int:
    """Keys of a position, from those of the one before."""
    return (key * 1_000_003 + token_id * 7_919 + 12_345) % MASK


def key_chain(token_ids: list[int], rope_length: int = 0) -> list[int]:
    """The keys of every position."""
    return list(itertools.accumulate(token_ids, next_key, initial=rope_length))[1:]


def expected_tokens(prompt: list[int], count: int, *, vocab_size: int = 97, seed: int = 0, rope_length: int = 0) -> list[int]:
    """The answer to a prompt, computed without blocks, batches or schedules."""
    key = key_chain(prompt, rope_length)[-1]
    answer: list[int] = []
    while len(answer) < count:
        answer.append(draw(key, seed, len(answer), vocab_size))
        key = next_key(key, answer[-1])
    return answer


def draw(key: int, seed: int, number: int, vocab_size: int) -> int:
    """The token that follows."""
    return next_key(next_key(key, seed), number) % vocab_size


class FakeRank:
    """An `Executor` that checks every plan. `poison`: computing this token raises; `bad_draw`: drawing this token is a slot error.

    `late`: whether the token of a slot that goes to a place is late, asked each time that it may be. `ends`: an answer allows nothing behind these tokens; what
    has such a last token has ended, however often it is computed.
    """

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        max_batch_size: int = 4,
        session_len: int = 48,
        *,
        vocab_size: int = 97,
        rope_depends_on_length: bool = False,
    ) -> None:
        bill = MemoryBill(
            device="fake",
            weights=0,
            kv_pool=0,
            workspace=0,
            other=0,
            total=0,
            free=0,
            num_blocks=num_blocks,
            block_size=block_size,
            bytes_per_token=0,
            session_len=session_len,
        )
        self.info = EngineInfo(
            session_len=session_len, vocab_size=vocab_size, max_batch_size=max_batch_size, memory=bill, kernels={}, dtype="none", start_seconds=0.0
        )
        self.rope_depends_on_length = rope_depends_on_length
        self.poison: int | None = None
        self.bad_draw: int | None = None
        self.late: Callable[[int, int], bool] = lambda slot, place: False
        self.num_late = 0  # times that a token was
        self.ends: frozenset[int] = frozenset()
        self.num_ended = 0  # times that this was said in place of a token
        self.broken = 0  # so many next steps raise, whatever is in them
        self.half_applied = False  # a failing step has set up its slots already
        self.plans: list[StepPlan] = []
        self.slots: dict[int, Slot] = {}
        self.closed = False
        self._store: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._queue: deque[tuple[StepPlan, Items]] = deque()
        self._next_step = 0
        self._doomed = 0

    def delay(self, *tokens: tuple[int, int]) -> None:
        """Be late with the tokens of these (slot, place), each as often as it stands here."""
        left = Counter(tokens)

        def late(slot: int, place: int) -> bool:
            left[slot, place] -= 1
            return left[slot, place] >= 0

        self.late = late

    @property
    def owes_an_end(self) -> bool:
        """Whether an answer has ended, and that was not said."""
        return any(self._has_ended(slot) and not slot.over for slot in self.slots.values())

    def submit(self, plan: StepPlan) -> None:
        """Remember the plan; it is computed when its result is asked for."""
        check(len(self._queue) < 2, "an executor need not take three plans at once")
        check(plan.step >= self._next_step and len(plan.items) > 0, f"step {plan.step} after {self._next_step}, or without items")
        self._next_step = plan.step + 1
        forgotten = {slot for earlier, _ in self._queue for slot in earlier.released} | set(plan.released)
        for number in {item.slot for item in plan.items} - forgotten:
            check(number not in self.slots or not self.slots[number].over, f"slot {number} goes on, though it was said that it is over")
        seen = msgspec.structs.replace(plan, items=Items.of(list(plan.items)))  # the scheduler may give the plan others
        self.plans.append(seen)
        self._queue.append((seen, plan.items))

    def result(self) -> StepResult:
        """Check and compute the oldest plan. What was launched on top of a step that failed, fails."""
        plan, items = self._queue.popleft()
        check(list(items) == list(plan.items), f"step {plan.step}: what a rank was given has been written to")
        if self._doomed:
            self._doomed -= 1
            raise RuntimeError("built on a failed step")
        try:
            return self._run(plan)
        except Exception:
            self._doomed = len(self._queue)
            raise

    def _run(self, plan: StepPlan) -> StepResult:
        self._fail_if_broken(before=True)
        for number in plan.released:
            self.slots.pop(number, None)
        for new in plan.new:
            check(new.slot not in self.slots and 0 <= new.slot < self.info.max_batch_size, f"slot {new.slot} is taken")
            self.slots[new.slot] = Slot(new, list(new.token_ids))
        for item in plan.items:
            self.slots[item.slot].blocks += item.new_blocks
        self._fail_if_broken(before=False)
        check(len({item.slot for item in plan.items}) == len(plan.items), "a slot twice in one step")
        result = StepResult.of(plan)
        rows = result.rows()
        goes_on, left_out = self._may_be_late({item.slot for item in plan.items})
        for row, item in enumerate(plan.items):
            self._compute(item, rows, row, item.slot in goes_on, item.slot in left_out)
        return result

    def _may_be_late(self, slots: set[int]) -> tuple[set[int], set[int]]:
        """Slots whose tokens may come with the next plan; and those that it has nothing of."""
        if not self._queue:
            return set(), set()
        behind, _ = self._queue[0]
        others = set(behind.released) | {new.slot for new in behind.new}
        return {i.slot for i in behind.items if i.sample and i.num_tokens == 1} - others, slots - {i.slot for i in behind.items} - others

    def _fail_if_broken(self, *, before: bool) -> None:
        if self.broken and before != self.half_applied:
            self.broken -= 1
            raise RuntimeError("broken step")

    def prepare_ahead(self) -> bool:
        """Nothing takes long."""
        return False

    def close(self) -> None:
        """Note that it happened."""
        self.closed = True

    def _compute(self, item: PlanItem, rows: Rows, row: int, goes_on: bool, left_out: bool) -> None:
        slot = self.slots[item.slot]
        if slot.over:  # launched before that was seen: nobody will look at the result
            rows[row].error = "over before"
            return
        end, known = item.start + item.num_tokens, len(slot.token_ids)
        if slot.owes:
            check((item.start, item.num_tokens, item.sample) == (known, 1, True), f"{item}: the token behind {known} is late, and this does not go on with it")
        else:
            check(item.num_tokens > 0 and end <= known, f"{item}: only {known} tokens are known")
            check(not item.sample or end == known, f"{item}: a token is drawn from the middle")
        check(len(slot.blocks) * self._block_size >= end and len(set(slot.blocks)) == len(slot.blocks), f"{item}: blocks {slot.blocks}")
        self._fill_keys(slot, min(end, known))
        for position in range(item.start):
            stored = self._store[slot.blocks[position // self._block_size]][position % self._block_size]
            check(stored == slot.keys[position], f"{item}: wrong keys at position {position}")
        for position in range(item.start, end):
            if position < known and slot.token_ids[position] == self.poison:
                raise PoisonError(f"token {self.poison}")
            self._write(item.slot, slot, position)
        self._answer(PlanItem(item.slot, known - 1, 1, [], True) if slot.owes else item, slot, rows, row, goes_on, left_out)

    def _fill_keys(self, slot: Slot, end: int) -> None:
        while len(slot.keys) < end:
            before = slot.keys[-1] if slot.keys else (slot.new.rope_length if self.rope_depends_on_length else 0)
            slot.keys.append(next_key(before, slot.token_ids[len(slot.keys)]))

    def _write(self, number: int, slot: Slot, position: int) -> None:
        block, offset = slot.blocks[position // self._block_size], position % self._block_size
        key = slot.keys[position] if position < len(slot.keys) else GARBAGE
        for other_number, other in self.slots.items():
            if other_number != number and block in other.blocks:
                shared = other.blocks.index(block) * self._block_size + offset
                same = shared >= len(other.keys) or other.keys[shared] == key
                check(same, f"slot {number} overwrites keys of slot {other_number}")
        self._store[block][offset] = key

    def _answer(self, item: PlanItem, slot: Slot, results: Rows, row: int, goes_on: bool, left_out: bool) -> None:
        sampling, prompt_len, end = slot.new.sampling, slot.new.prompt_len, item.start + item.num_tokens
        places = range(item.start, min(end, prompt_len - 1))
        if sampling.prompt_logprobs is not None and places:
            results[row].prompt_logprobs = [TokenLogprobs(slot.token_ids[p + 1], -float(slot.keys[p] % 100), []) for p in places]
        if sampling.output_logits == "all":
            results[row].logits = slot.keys[item.start : end]
        if not item.sample:
            return
        wants_more = sampling.output_logits is not None or row in results.result.more
        is_late = (goes_on or left_out) and not wants_more and self.late(item.slot, end)
        slot.owes = goes_on and is_late
        if is_late:
            self.num_late += 1
            results.result.tokens[row] = LATE
            return
        if self._has_ended(slot):
            self._end(slot, results, row, end)
            return
        token = draw(slot.keys[end - 1], sampling.seed, end - prompt_len, self._vocab_size)
        if token == self.bad_draw:
            slot.over = True
            results[row].error = f"token {token} cannot be drawn"
            return
        slot.token_ids.append(token)
        results.result.tokens[row] = token
        if self._has_ended(slot) and not goes_on:
            results[row].complete = slot.over = True
        if sampling.logprobs is not None:
            results[row].logprobs = TokenLogprobs(token, -1.0, [])
        if sampling.output_logits == "generation":
            results[row].logits = slot.keys[end - 1 : end]

    def _has_ended(self, slot: Slot) -> bool:
        return len(slot.token_ids) > slot.new.prompt_len and slot.token_ids[-1] in self.ends

    def _end(self, slot: Slot, results: Rows, row: int, end: int) -> None:
        """In place of a token; what else was computed of the row by then comes with it, and must not count."""
        self.num_ended += 1
        slot.over = True
        results.result.tokens[row] = ENDED
        if slot.new.sampling.logprobs is not None:
            results[row].logprobs = TokenLogprobs(0, -1.0, [])
            results[row].error = "no token is allowed"
        if slot.new.sampling.output_logits == "generation":
            results[row].logits = slot.keys[end - 1 : end]
