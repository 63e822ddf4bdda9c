"""Where a caller's stop words count: everywhere but in tool calls, which only the model can end. `answer.Answer` asks while it matches them."""

from __future__ import annotations

import re

from lmdeploy.serving.parsers.events import Content
from lmdeploy.serving.parsers.reasoning import ReasoningParser
from lmdeploy.serving.parsers.tools import ToolParser

#: calls begin and end with a character that is no part of a word
_PIECE = re.compile(r"\w+|\W")


class OutsideCalls:
    """Reads one answer. `required`: all of it is calls, but for the reasoning before them."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser, *, required: bool) -> None:
        self._reasoning, self._tools, self._required = reasoning, tools, required
        self._undecided = ""

    def split(self, text: str, *, last: bool = False) -> list[tuple[str, bool]]:
        """(piece, whether stop words count in it) of what is known by now; what may be the beginning of a call waits, unless it is the `last` text."""
        out: list[tuple[str, bool]] = []
        for piece in _PIECE.findall(text):
            before = self._inside()
            self._undecided += piece
            self._feed(piece)
            inside = before or self._inside()
            self._decide(out, len(self._undecided) - (0 if inside else self._held()), counts=not inside)
        if last:
            self._decide(out, len(self._undecided), counts=not self._inside())
        return out

    def _decide(self, out: list[tuple[str, bool]], length: int, *, counts: bool) -> None:
        if length > 0:
            out.append((self._undecided[:length], counts))
            self._undecided = self._undecided[length:]

    def _feed(self, piece: str) -> None:
        for event in [Content(piece)] if self._reasoning is None else self._reasoning.feed(piece):
            if isinstance(event, Content):
                self._tools.feed(event.text)

    def _inside(self) -> bool:
        bound = self._required and (self._reasoning is None or self._reasoning.has_content)
        return bound or self._tools.in_call

    def _held(self) -> int:
        return self._tools.held + (0 if self._reasoning is None else self._reasoning.held)
