"""`Fill` and `Pace`: how many tokens of prompts a step reads beside answers, where not as many as can be.

`Pace` is for requests that came together (`EngineRequest.batch`), of whose answers nobody reads one before all are written, and when it is known how long each
will be. A step of few tokens takes the time in which the weights are read, so prompts that are spread over the steps of the longest answers cost less than
prompts that are read at once, before most of these steps. They are read just fast enough for no answer to end after the longest one: longest processing time
first (Graham, Bounds on multiprocessing timing anomalies, 1969), for which whoever submits them puts the longest first (`longest_first`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, inf
from typing import TypeVar

from lmdeploy.messages import EngineRequest, SamplingParams

T = TypeVar("T")

#: waiting requests that `Fill` counts, at most; more are many
COUNTED = 32
#: steps after which the pace is worked out again, if no request came meanwhile
STEPS = 16
#: a step's tokens are a multiple of this, as sizes of CUDA graphs are
MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Fill:
    """Tokens of prompts beside so many answers that get their next token, ascending, while no more than `most` tokens of prompts could be computed.

    Up to a number of rows a step costs hardly more than reading the weights: prompts that are spread over such steps take less time in all, and make no answer
    wait long. Many prompts are computed at once instead: what they fill up with soon outweighs it.
    """

    beside: tuple[tuple[int, int], ...]
    most: int


def is_long_as_asked(sampling: SamplingParams) -> bool:
    """Whether nothing ends the answer before `max_new_tokens`, as far as the engine knows."""
    return sampling.ignore_eos and sampling.grammar is None


def longest_first(items: Iterable[T], sampling_of: Callable[[T], SamplingParams]) -> list[T]:
    """In an order that keeps all of them busy to the end: those that may be of any length first, in their order, then the others, the longest first."""

    def length(item: T) -> float:
        sampling = sampling_of(item)
        return sampling.max_new_tokens if is_long_as_asked(sampling) else inf

    return sorted(items, key=lambda item: -length(item))


def is_paced(request: EngineRequest) -> bool:
    """Whether the prompt may be read as slowly as is best for all."""
    return request.batch > 0 and request.sampling.max_new_tokens > 0 and is_long_as_asked(request.sampling)


def tokens_needed(longest: int, unread: int, waiting: Iterable[tuple[int, int]]) -> float:
    """Tokens a step with which every answer that waits ends before `longest` steps are over; inf where none would do.

    `waiting`: (tokens of the prompt, tokens of the answer) in the order in which they are read, after `unread` ones of other prompts.
    """
    needed = 0.0
    for prompt, answer in waiting:
        unread += prompt
        needed = max(needed, unread / (longest - answer) if answer < longest else inf)
    return needed


class Pace:
    """Of one scheduler. `least` tokens a step at least: fewer save nothing."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._due = 0
        self._tokens: int | None = None

    def changed(self) -> None:
        """Other requests wait now."""
        self._due = 0

    def tokens(self, step: int, find: Callable[[], float]) -> int | None:
        """Of prompts, in a step of this number; None: as many as can be. `find`: what `tokens_needed` says now."""
        if step >= self._due:
            self._due, needed = step + STEPS, find()
            self._tokens = None if needed == inf else max(self._least, ceil(needed / MULTIPLE) * MULTIPLE)
        return self._tokens
