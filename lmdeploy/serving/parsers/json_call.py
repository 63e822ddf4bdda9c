"""Reads tool calls written as JSON from a text that grows, and gives their arguments away while they are being written.

`read(text, place)` takes what it can from `place` on and returns how far it came; `status` then tells whether it wants more text.
The verdict does not depend on how the text was cut.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, Protocol

from lmdeploy.serving.parsers.events import CallArguments, CallEnd, CallStart, Event, sure_length

Status = Literal["open", "done", "failed"]
ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = ("name", *ARGUMENT_KEYS, "type", "id")

_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'[{}\[\]"]')
_SCALAR_END = re.compile(r"[\s,}\]]")
_SPACE = re.compile(r"\s*")


class CallReader(Protocol):
    """Reads one call, or a list of them, behind its opening tag."""

    status: Status
    events: list[Event]

    def read(self, text: str, place: int) -> int:
        """Take what belongs to the call; the place behind it."""

    def finish(self) -> None:
        """The text ends here."""


class ValueScanner:
    """Finds the end of one JSON value by its brackets and strings; whether it is valid is for a JSON parser to say."""

    def __init__(self) -> None:
        self._depth = 0
        self._kind = ""  # '' = not begun, 'string', 'nested', 'scalar'
        self._in_string = self._escaped = False

    def scan(self, text: str, place: int) -> int:
        """The index behind the value, -1 when it goes on after `text`. The value begins at the first place scanned."""
        while place < len(text):
            if not self._kind:
                place += self._begin(text[place])
            elif self._kind == "scalar":
                end = _SCALAR_END.search(text, place)
                return end.start() if end else -1
            elif self._escaped:
                self._escaped = False
                place += 1
            else:
                found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, place)
                if found is None:
                    return -1
                place = found.end()
                if self._ends(found.group()):
                    return place
        return -1

    def _begin(self, char: str) -> int:
        """What kind of value it is; how many characters that told."""
        self._kind = "string" if char == '"' else "nested" if char in "{[" else "scalar"
        self._in_string = char == '"'
        self._depth = int(char in "{[")
        return int(self._kind != "scalar")

    def _ends(self, char: str) -> bool:
        if self._in_string:
            self._escaped = char == "\\"
            self._in_string = self._escaped
            return not self._in_string and self._depth == 0
        self._in_string = char == '"'
        self._depth += (char in "{[") - (char in "}]")
        return self._depth == 0


class ObjectCall:
    """{"name": .., "arguments": {..}}, or "parameters"; keys in any order, other keys are skipped. `names`: the tools that may be called.

    `bare`: no tag tells that it is a call, so the first key that no call has decides against it.
    """

    def __init__(self, names: frozenset[str], *, bare: bool = False) -> None:
        self.status: Status = "open"
        self.events: list[Event] = []
        self._names, self._bare = names, bare
        self._step = "open"  # open, key, key text, colon, value start, value
        self._scanner = ValueScanner()
        self._pieces: list[str] = []
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None  # known, but the name is not
        self._streams = self._told = False

    def read(self, text: str, place: int) -> int:
        """See the module."""
        while self.status == "open" and place < len(text):
            if self._step in ("key text", "value"):
                place = self._scan(text, place)
                continue
            place = _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches anything
            if place < len(text):
                place += self._punctuation(text[place])
        return place

    def finish(self) -> None:
        """The text ends here."""
        if self.status == "open":
            self.status = "failed"

    def _punctuation(self, char: str) -> int:
        """One character between keys and values; how many of it were taken."""
        if self._step == "open" and char == "{":
            self._step = "key"
        elif self._step == "key" and char == ",":
            pass
        elif self._step == "key" and char == "}":
            self._close()
        elif self._step == "key" and char == '"':
            return self._expect("key text")
        elif self._step == "colon" and char == ":":
            self._step = "value start"
        elif self._step == "value start":
            self._streams = char == "{" and self._key in ARGUMENT_KEYS and self._name is not None and not self._told
            if self._streams:
                self.events.append(CallStart(self._name or ""))
                self._told = True
            return self._expect("value")
        else:
            self.status = "failed"
            return 0
        return 1

    def _expect(self, step: str) -> int:
        self._step, self._scanner, self._pieces = step, ValueScanner(), []
        return 0

    def _scan(self, text: str, place: int) -> int:
        end = self._scanner.scan(text, place)
        piece = text[place:] if end < 0 else text[place:end]
        self._pieces.append(piece)
        if self._step == "value" and self._streams and piece:
            self.events.append(CallArguments(piece))
        if end < 0:
            return len(text)
        try:
            self._have(json.loads("".join(self._pieces)))
        except (ValueError, RecursionError):
            self.status = "failed"
        return end

    def _have(self, value: Any) -> None:
        """A key or a value is complete; raises ValueError for one that makes no call."""
        if self._step == "key text":
            self._key, self._step = value, "colon"
            if self._bare and value not in CALL_KEYS:
                raise ValueError
            return
        self._step = "key"
        if self._key == "name":
            if value not in self._names if isinstance(value, str) else True:
                raise ValueError
            self._name = value
        elif self._key in ARGUMENT_KEYS and not self._streams:
            self._arguments = _object_text(value, "".join(self._pieces))
        self._streams = False
        if self._name is not None and self._arguments is not None and not self._told:
            self._tell(self._arguments)

    def _close(self) -> None:
        if self._name is None:
            self.status = "failed"
            return
        if not self._told:
            self._tell("{}")
        self.events.append(CallEnd())
        self.status = "done"

    def _tell(self, arguments: str) -> None:
        self.events += [CallStart(self._name or ""), CallArguments(arguments)]
        self._told = True


def _object_text(value: Any, text: str) -> str:
    """The JSON text of an object: as it is, out of a string, or for null an empty one. Raises ValueError for anything else."""
    if isinstance(value, str):
        text, value = value, json.loads(value)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise ValueError
    return text


class NamedCall:
    """NAME>{..}: the name is in the opening tag (`<function=NAME>`), which `read` gets from the name on."""

    def __init__(self, names: frozenset[str]) -> None:
        self.status: Status = "open"
        self.events: list[Event] = []
        self._names, self._name = names, ""
        self._step = "name"  # name, value start, value
        self._scanner, self._pieces = ValueScanner(), list[str]()
        self._longest = max((len(name) for name in names), default=0)

    def read(self, text: str, place: int) -> int:
        """See the module."""
        if self._step == "name":
            place = self._read_name(text, place)
        if self._step == "value start" and self.status == "open":
            place = _SPACE.match(text, place).end()  # type: ignore[union-attr]
            if place < len(text):
                if text[place] != "{":
                    self.status = "failed"
                    return place
                self._step = "value"
                self.events.append(CallStart(self._name))
        if self._step == "value" and self.status == "open":
            place = self._read_value(text, place)
        return place

    def finish(self) -> None:
        """The text ends here."""
        if self.status == "open":
            self.status = "failed"

    def _read_name(self, text: str, place: int) -> int:
        end = text.find(">", place)
        self._name += text[place:] if end < 0 else text[place:end]
        over = len(self._name) - self._longest
        if over > 0 or (end >= 0 and self._name not in self._names):
            self.status = "failed"
            return (len(text) if end < 0 else end) - max(over, 0)
        if end < 0:
            return len(text)
        self._step = "value start"
        return end + 1

    def _read_value(self, text: str, place: int) -> int:
        end = self._scanner.scan(text, place)
        piece = text[place:] if end < 0 else text[place:end]
        self._pieces.append(piece)
        if piece:
            self.events.append(CallArguments(piece))
        if end < 0:
            return len(text)
        try:
            json.loads("".join(self._pieces))
            self.events.append(CallEnd())
            self.status = "done"
        except (ValueError, RecursionError):
            self.status = "failed"
        return end


class CodeCall:
    """Plain code up to the closing tag, or to the end of the answer; a Markdown fence around it is taken off. Arguments: {"code": text}."""

    def __init__(self, name: str, close: str) -> None:
        self.status: Status = "open"
        self.events: list[Event] = []
        self._name, self._close = name, close
        self._held = ""
        self._begun = self._fenced = False

    def read(self, text: str, place: int) -> int:
        """Takes the code; the closing tag is left to the caller."""
        self._held += text[place:]
        end = self._held.find(self._close)
        if end >= 0:
            left = len(self._held) - end
            self._held = self._held[:end]
            self._emit(final=True)
            return len(text) - left
        self._emit(final=False)
        return len(text)

    def finish(self) -> None:
        """The text ends here: the model's stop token closes a call."""
        if self.status == "open":
            self._emit(final=True)

    def _emit(self, *, final: bool) -> None:
        if not self._begun and not self._begin(final):
            return
        # white space, a fence's end and the beginning of the closing tag may turn out not to be code
        code = self._held[: sure_length(self._held, (self._close,))].rstrip()
        sure = len(code.removesuffix("`").removesuffix("`").removesuffix("`").rstrip())
        piece, self._held = self._held[:sure], self._held[sure:]
        if final:
            rest = self._held.rstrip()
            piece, self._held = piece + (rest[:-3].rstrip() if self._fenced and rest.endswith("```") else rest), ""
        if piece:
            self.events.append(CallArguments(json.dumps(piece, ensure_ascii=False)[1:-1]))
        if final:
            self.events += [CallArguments('"}'), CallEnd()]
            self.status = "done"

    def _begin(self, final: bool) -> bool:
        """Skip the fence's first line; False while it is not complete."""
        text = self._held.lstrip()
        if not final and (len(text) < 3 or (text.startswith("```") and "\n" not in text)):
            return False
        self._fenced = text.startswith("```")
        self._held = text.split("\n", 1)[-1] if self._fenced else text
        self._begun = True
        self.events += [CallStart(self._name), CallArguments('{"code": "')]
        return True
