"""The events that parsers give, and the search for tags in a text that grows.

Cutting a text into other pieces changes where events are cut, never what they say: what may be the beginning of a tag is
held back until it is known to be none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer proper."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the arguments of the call that has begun."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete: its arguments are a JSON object."""


@dataclass(frozen=True, slots=True)
class CallFailed:
    """The call that has begun turned out to be none: its `text` is content. `at_end`: because the answer broke off."""

    text: str
    at_end: bool = False


Event = Content | Reasoning | CallStart | CallArguments | CallEnd | CallFailed


def find_tag(text: str, tags: Sequence[str]) -> tuple[int, str] | None:
    """Place and name of the first tag in `text`."""
    found = [(place, tag) for tag in tags if (place := text.find(tag)) >= 0]
    return min(found) if found else None


def sure_length(text: str, tags: Sequence[str]) -> int:
    """How much of `text`, which holds no whole tag, can be no part of one, whatever follows."""
    longest = max((len(tag) for tag in tags), default=1) - 1
    for start in range(max(len(text) - longest, 0), len(text)):
        if any(tag.startswith(text[start:]) for tag in tags):
            return start
    return len(text)
