"""Feeds texts to parsers and says in plain words what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy.serving.parsers.events import CallArguments, CallEnd, CallFailed, CallStart, Content, Event, Reasoning
from lmdeploy.serving.parsers.registry import TOOL_FORMATS
from lmdeploy.serving.parsers.tools import ToolParser

NAMES = frozenset(("add", "get_weather", "a.b-c"))


def read_tools(name: str, pieces: Sequence[str], *, cut: bool = False, **options: Any) -> list[Event]:
    """All events of the pieces of a text."""
    parser = ToolParser(TOOL_FORMATS[name], NAMES, **options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish(cut=cut)


def joined(events: Sequence[Event]) -> list[tuple[str, ...]]:
    """Neighbouring pieces of one kind as one; a call as (name, arguments, end)."""
    out: list[tuple[str, ...]] = []
    for event in events:
        match event:
            case Content(text) | Reasoning(text):
                kind = "content" if isinstance(event, Content) else "reasoning"
                if out and out[-1][0] == kind:
                    out[-1] = (kind, out[-1][1] + text)
                elif text:
                    out.append((kind, text))
            case CallStart(name):
                out.append(("call", name, "", "open"))
            case CallArguments(text):
                out[-1] = ("call", out[-1][1], out[-1][2] + text, "open")
            case CallEnd():
                out[-1] = (*out[-1][:3], "done")
            case CallFailed(text):
                out[-1] = (*out[-1][:3], "failed")
                out.append(("content", text))
    return out


def cut_at(text: str, places: Sequence[int]) -> list[str]:
    """The text in pieces."""
    borders = [0, *sorted({p % (len(text) + 1) for p in places}), len(text)]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]
