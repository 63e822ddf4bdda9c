"""Finds tool calls in an answer, in whatever notation the model's family writes them.

A notation is data (`ToolFormat`); the text between calls is content. What begins like a call and is none comes out as content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmdeploy.serving.parsers.events import CallFailed, CallStart, Content, Event, find_tag, sure_length
from lmdeploy.serving.parsers.json_call import CallReader, CodeCall, NamedCall, ObjectCall

#: the name under which a code interpreter is called; its one argument is `code`
INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class CallForm:
    """One way to write a call. `open` is '' for bare JSON, which counts at the beginning of an answer and behind other calls only."""

    open: str
    close: str = ""
    kind: Literal["object", "named", "code"] = "object"
    gap: str = ""  # what the model was trained to write between the opening tag and the call
    more: bool = False  # several objects may follow one tag, separated by ';' or white space

    def reader(self, names: frozenset[str]) -> CallReader:
        """A reader of what follows `open`."""
        if self.kind == "code":
            return CodeCall(INTERPRETER, self.close)
        return NamedCall(names) if self.kind == "named" else ObjectCall(names, bare=not self.open)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The notation of a family; the first form is the one that it was trained on."""

    forms: tuple[CallForm, ...]
    key: Literal["arguments", "parameters"] = "arguments"
    in_list: bool = False  # calls are written as one JSON list
    one_call: bool = False  # the end of a call ends the answer

    @property
    def tags(self) -> tuple[str, ...]:
        """All opening tags."""
        return tuple(form.open for form in self.forms if form.open)


class ToolParser:
    """Feed text, get `Content` and calls.

    `names`: the tools that may be called. `code`: so may a code interpreter, in a notation of its own. `one_call`: what follows a call is dropped.
    """

    def __init__(self, tools: ToolFormat, names: frozenset[str], *, code: bool = False, one_call: bool = False) -> None:
        self._names, self._one_call = names, one_call
        self._forms = {form.open: form for form in tools.forms if form.kind != "code" or code}
        self._tags = tuple(tag for tag in self._forms if tag)
        self._text = ""  # not yet understood
        self._state = "text"  # text, call, between (objects of a list), closing, over
        self._at_start = True  # nothing but white space and calls so far
        self._after_call = False  # white space is dropped
        self._form = CallForm("")
        self._reader: CallReader = ObjectCall(names)
        self._raw = ""  # of the call that is being read, its opening included
        self._in_list = self._begun = False
        self._is_fresh = False  # nothing of the call was read yet

    @property
    def in_call(self) -> bool:
        """Whether the text so far ends within a call, its closing tag included, or behind the only one that may be."""
        return self._state != "text" and not (self._state == "closing" and not self._form.close)

    @property
    def held(self) -> int:
        """How many characters at the end may be the beginning of a call."""
        return len(self._text)

    def feed(self, text: str) -> list[Event]:
        """The events that `text` makes certain."""
        self._text += text
        events: list[Event] = []
        steps = {"text": self._content, "call": self._call, "between": self._between, "closing": self._closing, "over": self._over}
        while self._text and steps[self._state](events):
            pass
        return events

    def finish(self, *, cut: bool = False) -> list[Event]:
        """What was held back. `cut`: it was not the model that ended the answer, so an open call is none."""
        events: list[Event] = []
        if self._state == "call":
            if not (cut and self._form.kind == "code"):
                self._reader.finish()
            self._take(events)
            if self._state == "call":
                self._fail(events, at_end=True)
        if self._state == "text":
            self._tell(events, len(self._text))
        return events

    def _content(self, events: list[Event]) -> bool:
        """Text up to the next call."""
        if "" in self._forms and self._at_start:
            bare = self._text.lstrip()
            if not bare:
                return False
            if bare[0] in "{[":
                self._open(self._forms[""], len(self._text) - len(bare))
                return True
        found = find_tag(self._text, self._tags)
        self._tell(events, sure_length(self._text, self._tags) if found is None else found[0])
        if found is not None:
            self._open(self._forms[found[1]], len(found[1]))
        return found is not None

    def _tell(self, events: list[Event], length: int) -> None:
        """Give the first `length` characters away as content."""
        piece, self._text = self._text[:length], self._text[length:]
        kept = piece.lstrip() if self._after_call else piece
        if kept.strip():
            self._at_start = False
        if kept:
            self._after_call = False
            events.append(Content(kept))

    def _open(self, form: CallForm, length: int) -> None:
        self._state, self._form, self._in_list, self._is_fresh = "call", form, False, form.kind == "object"
        self._raw, self._text = self._text[:length], self._text[length:]
        self._reader = form.reader(self._names)

    def _call(self, events: list[Event]) -> bool:
        """Text of a call."""
        if self._is_fresh and not self._enter():
            return False
        place = self._reader.read(self._text, 0)
        self._raw, self._text = self._raw + self._text[:place], self._text[place:]
        self._take(events)
        if self._reader.status == "failed":
            self._fail(events)
        return self._state != "call"

    def _enter(self) -> bool:
        """Is it a list? False while that is not known."""
        text = self._text.lstrip()
        if text[:1] == "[":
            length = len(self._text) - len(text) + 1
            self._raw, self._text, self._in_list = self._raw + self._text[:length], self._text[length:], True
        self._is_fresh = not text
        return bool(text)

    def _take(self, events: list[Event]) -> None:
        """Move the reader's events over; a call that is complete changes the state."""
        self._begun = self._begun or any(isinstance(event, CallStart) for event in self._reader.events)
        events += self._reader.events
        self._reader.events = []
        if self._reader.status == "done":
            self._state = "over" if self._one_call else "between" if self._in_list or self._form.more else "closing"
            self._after_call, self._begun = True, False

    def _fail(self, events: list[Event], *, at_end: bool = False) -> None:
        """The text of the call is content after all."""
        events.append(CallFailed(self._raw, at_end) if self._begun else Content(self._raw))
        self._state, self._raw, self._at_start, self._after_call, self._begun = "text", "", False, False, False

    def _between(self, events: list[Event]) -> bool:
        """After an object of a list: another one, or the list's end."""
        text = self._text = self._text.lstrip()
        if text[:1] in (",", ";"):
            self._text = text[1:]
        elif text[:1] == "{":
            self._state, self._raw, self._reader = "call", "", ObjectCall(self._names)
        elif text:
            self._text = text[1:] if text[0] == "]" and self._in_list else text
            self._state = "closing"
        return True

    def _closing(self, events: list[Event]) -> bool:
        """The closing tag, which may be missing where a stop token stands for it."""
        text = self._text.lstrip()
        close = self._form.close
        if text.startswith(close):
            self._state, self._text = "text", text[len(close) :]
            return True
        if close.startswith(text):
            return False
        self._state = "text"
        return True

    def _over(self, events: list[Event]) -> bool:
        self._text = ""
        return False
