"""`Sequence`: one answer being computed. Only the scheduler changes it.

Three counts move in order: `num_done <= num_computed <= num_tokens`. `num_done` positions certainly have their keys and values
(results were seen); `num_computed` adds those of plans in flight; `num_tokens` adds tokens that plans in flight will sample
(`num_pending`: the rank knows them, we do not yet). Without run-ahead the first two are equal between steps.
"""

from __future__ import annotations

import time
from array import array

import numpy as np
from numpy.typing import NDArray

from lmdeploy.engine.plan import Ints
from lmdeploy.engine.prefix_cache import Node, RootKey
from lmdeploy.messages import EngineRequest, SamplingParams, TokenLogprobs

#: columns of a sequence's counts: a launch changes the first two, a result the second and the two behind it
COMPUTED, PENDING, KNOWN, DONE, BLOCKS, PUBLISHED, PROMPT, LIMIT, SAMPLES, REQUEST, INDEX = range(11)


class TokenLog:
    """The latest tokens of all slots, a row for each step: a step's tokens are written side by side, and who asks for a sequence's own finds them here."""

    def __init__(self, num_rows: int, num_slots: int) -> None:
        self.rows = np.zeros((num_rows, num_slots), dtype=np.int32)
        self.used = 0  # rows

    def add(self, slots: Ints, tokens: Ints) -> None:
        """Rows [steps, slots]: a token of each of these slots, of which each has one in every row since it was asked for last."""
        end = self.used + len(tokens)
        self.rows[self.used : end, slots] = tokens
        self.used = end

    def last(self, slot: int, count: int) -> bytes:
        """So many of the slot's tokens."""
        return self.rows[self.used - count : self.used, slot].tobytes()


_NO_LOG = TokenLog(0, 0)


class Sequence:
    """State of one of the `n` answers of a request.

    Its counts are a row of int64: its own while it waits, one of the scheduler's table while it has a slot, so that a step over all running
    sequences is a few operations on the table's columns.
    """

    __slots__ = (
        *("request", "index", "arrival", "sampling", "max_tokens", "stop_ids", "prompt_len", "ended", "root_key"),
        *("counts", "_ids", "_log", "blocks", "slot", "retry_version", "siblings"),
        *("node", "num_cached", "wants_rows", "wants_all_rows", "rows_done", "prompt_logprobs", "embedding"),
        *("created", "queue_seconds", "compiled"),
    )

    def __init__(self, request: EngineRequest, index: int, arrival: int, sampling: SamplingParams, max_tokens: int, root_key: RootKey) -> None:
        self.request = request
        self.index = index  # which of the n answers
        self.arrival = arrival  # order and priority: lower goes first
        self.sampling = sampling  # the request's, seed offset by index
        self.max_tokens = max_tokens  # prompt + answer end here at the latest
        self.stop_ids: frozenset[int] = frozenset() if sampling.ignore_eos else frozenset(sampling.stop_token_ids)
        self.root_key = root_key  # the prefixes that it may share
        self._ids = array("i", request.token_ids)  # of `token_ids`, those that are not in the log only; numbers in a row, which can be compared as bytes
        self._log = _NO_LOG
        self.prompt_len = length = len(request.token_ids)
        self.counts: Ints = np.array([0, 0, length, 0, 0, 0, length, max_tokens, sampling.max_new_tokens > 0, request.request_id, index])
        self.blocks: list[int] = []  # block table; each entry holds one reference
        self.slot = -1  # place on the rank; -1 while waiting
        self.node: Node | None = None  # the last published block in the prefix cache
        self.num_cached = -1  # prompt tokens found in the prefix cache at the first start; -1 = not started
        self.retry_version = -1  # pool.version at which there was no room
        self.siblings: list[Sequence] = []  # answers that wait for this one's prompt
        self.ended = False
        self.compiled: object = None  # its grammar, held
        self.created = time.monotonic()
        self.queue_seconds: float | None = None  # from then to the first start
        self.wants_all_rows = "all" in (sampling.output_logits, sampling.output_last_hidden_state)
        self.wants_rows = self.wants_all_rows or sampling.prompt_logprobs is not None
        self.rows_done = 0  # positions whose output rows (prompt log-probabilities, logits) have been handed on
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.embedding: NDArray[np.float64] | None = None  # [M], pooled so far

    def take_slot(self, slot: int, row: Ints, log: TokenLog) -> None:
        """Move the counts to the row of a slot. `log`: where others may put new tokens while they count them, if they call `catch_up` before a row there is
        without one, and before it begins anew."""
        row[:] = self.counts
        row[BLOCKS] = len(self.blocks)
        self.slot, self.counts, self._log = slot, row, log

    def leave_slot(self) -> None:
        """Without slot and blocks nothing is computed."""
        self.catch_up()
        self.slot, self.counts, self._log = -1, self.counts.copy(), _NO_LOG
        self.counts[[PENDING, COMPUTED, DONE, BLOCKS, PUBLISHED]] = 0

    @property
    def num_behind(self) -> int:
        """Known tokens that are in the log only."""
        return self.num_known - len(self._ids)

    def catch_up(self) -> None:
        """Take over the tokens that are in the log only."""
        if behind := self.counts.item(KNOWN) - len(self._ids):
            self._ids.frombytes(self._log.last(self.slot, behind))

    @property
    def token_ids(self) -> list[int]:
        """Prompt and known generated tokens, a copy; `append` adds one."""
        self.catch_up()
        return self._ids.tolist()

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.catch_up()
        self._ids.append(token_id)
        self.counts[KNOWN] += 1

    @property
    def num_known(self) -> int:
        """Tokens whose numbers are known."""
        return self.counts.item(KNOWN)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, on the rank at least."""
        return self.counts.item(KNOWN) + self.counts.item(PENDING)

    @property
    def num_pending(self) -> int:
        """Tokens that plans in flight will sample."""
        return self.counts.item(PENDING)

    @num_pending.setter
    def num_pending(self, count: int) -> None:
        self.counts[PENDING] = count

    @property
    def num_computed(self) -> int:
        """Positions whose keys and values are there once all plans in flight are computed."""
        return self.counts.item(COMPUTED)

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        self.counts[COMPUTED] = count

    @property
    def num_done(self) -> int:
        """Positions whose keys and values are certainly there."""
        return self.counts.item(DONE)

    @num_done.setter
    def num_done(self, count: int) -> None:
        self.counts[DONE] = count

    @property
    def num_published(self) -> int:
        """Leading blocks that were found in or offered to the prefix cache."""
        return self.counts.item(PUBLISHED)

    @num_published.setter
    def num_published(self, count: int) -> None:
        self.counts[PUBLISHED] = count

    def content(self, block: int, size: int) -> bytes:
        """What the prefix cache compares of a full block of so many tokens: these, but of those that stand for a picture, which one it is, and which of its parts."""
        first, end = block * size, (block + 1) * size
        if len(self._ids) < end:
            self.catch_up()
        ids, shown = self._ids[first:end], b""
        for picture in self.request.pictures:
            begin, behind = max(picture.start, first), min(picture.start + picture.count, end)
            if begin < behind:
                ids[begin - first : behind - first] = array("i", [0] * (behind - begin))
                shown += f" {picture.digest} {first - picture.start} {picture.count}".encode()
        return ids.tobytes() + shown

    @property
    def num_generated(self) -> int:
        """Known tokens of the answer."""
        return self.num_known - self.prompt_len

    @property
    def max_reusable(self) -> int:
        """Leading tokens that may come from a cache: the last one is computed, for its logits, and so is any whose output row is owed."""
        if self.sampling.embed == "mean":
            return 0  # the sum is over all rows, in the order of the positions
        last = self.num_tokens - 1
        if not self.wants_rows or (not self.wants_all_rows and self.rows_done >= self.prompt_len - 1):
            return last
        return min(last, self.rows_done)
