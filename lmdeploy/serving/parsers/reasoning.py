"""Splits an answer into reasoning and content: `<think>` .. `</think>` at its beginning, the first tag possibly written by the template."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.serving.parsers.events import Content, Event, Reasoning, find_tag, sure_length


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The tags of a family. `by_default`: its models think unless `enable_thinking` is false."""

    open: str = "<think>"
    close: str = "</think>"
    by_default: bool = True


class ReasoningParser:
    """Feed text, get `Reasoning` and `Content`. White space around the reasoning is dropped.

    `opened`: the prompt ends with the opening tag. `interrupts`: tags of tool calls, which end the reasoning too.
    """

    def __init__(self, tags: ReasoningFormat, *, opened: bool = False, interrupts: tuple[str, ...] = ()) -> None:
        self._tags, self._opened = tags, opened
        self._ends = (tags.close, *interrupts)
        self._held = ""
        self._trim = True  # the white space that comes next is dropped
        self._thought = False
        self._state = "start"  # start, reasoning, content

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends within the reasoning."""
        return self._state == "reasoning" or (self._state == "start" and self._opened)

    @property
    def has_thought(self) -> bool:
        """Whether there was, or is, any reasoning: tags count."""
        return self.is_thinking or self._thought

    @property
    def has_content(self) -> bool:
        """Whether the answer proper has begun."""
        return self._state == "content"

    @property
    def held(self) -> int:
        """How many characters at the end are not understood yet."""
        return len(self._held)

    def feed(self, text: str) -> list[Event]:
        """The events that `text` makes certain."""
        if self._state == "content" and not self._trim:
            return [Content(text)] if text else []
        self._held += text
        events: list[Event] = []
        if self._state == "start":
            self._begin()
        if self._state == "reasoning":
            self._thought = True
            self._think(events)
        if self._state == "content":
            self._answer(events)
        return events

    def finish(self) -> list[Event]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self.is_thinking:
            held = held.lstrip() if self._trim else held
            return [Reasoning(held.rstrip())] if held.strip() else []
        return [Content(held)] if held and not (self._trim and self._state == "content") else []

    def _begin(self) -> None:
        """Is there an opening tag?"""
        text = self._held.lstrip()
        if text.startswith(self._tags.open):
            self._state, self._held = "reasoning", text[len(self._tags.open) :]
        elif not self._tags.open.startswith(text):
            self._state = "reasoning" if self._opened else "content"
            self._trim = self._opened

    def _think(self, events: list[Event]) -> None:
        if self._trim:
            self._held = self._held.lstrip()
        found = find_tag(self._held, self._ends)
        if found is None:
            self._tell(events, len(self._held[: sure_length(self._held, self._ends)].rstrip()))
            return
        place, tag = found
        rest = self._held[place:] if tag != self._tags.close else self._held[place + len(tag) :]
        self._tell(events, len(self._held[:place].rstrip()))
        self._state, self._held, self._trim = "content", rest, True

    def _tell(self, events: list[Event], length: int) -> None:
        if length:
            events.append(Reasoning(self._held[:length]))
            self._held, self._trim = self._held[length:], False

    def _answer(self, events: list[Event]) -> None:
        text = self._held.lstrip() if self._trim else self._held
        if text:
            events.append(Content(text))
            self._held, self._trim = "", False
