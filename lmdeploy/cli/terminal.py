"""A conversation in the terminal, whoever answers: `chat` (a model in this process) and `serve api_client` (HTTP) share it.

Knows messages and `Response` increments only. The answer alone goes to `Screen.answers`; prompts, figures and complaints are
notes, so that `lmdeploy chat < question > answer` writes the answer and nothing else. Ctrl-C ends an answer, never the program;
at the prompt it leaves.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, TextIO

from lmdeploy.errors import EngineError, LmdeployError, RequestError
from lmdeploy.messages import Response

PROMPT = "double enter to end input >>> "
NEW_CONVERSATION = "type `end` to begin a new conversation"
REPEAT = "nothing was answered; type `again` to repeat the question"

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Aside:
    """What belongs to an answer and is not said: reasoning, a call of a tool."""

    text: str


@dataclass(frozen=True, slots=True)
class Anew:
    """What came of the answer so far is void; it begins again."""


#: messages so far, the user's last -> increments of the answer; closing the generator stops it
Ask = Callable[[list[Message]], Generator[Response | Aside | Anew, None, None]]


@dataclass(frozen=True, slots=True)
class Screen:
    """Where the answer and the notes are written."""

    answers: TextIO
    notes: TextIO
    styled: bool = False

    def answer(self, text: str) -> None:
        """A piece of the answer, at once."""
        self.answers.write(text)
        self.answers.flush()

    def note(self, text: str = "", *, dim: bool = False) -> None:
        """A line that is not part of an answer."""
        self.aside(text, dim=dim)
        self.notes.write("\n")
        self.notes.flush()

    def aside(self, text: str, *, dim: bool = True) -> None:
        """A piece of text that is not part of an answer, at once."""
        self.notes.write(f"\x1b[2m{text}\x1b[0m" if dim and self.styled else text)
        self.notes.flush()


def open_screen() -> Screen:
    """Both parts on standard output when that is a terminal; else notes go to standard error."""
    terminal = sys.stdout.isatty()
    return Screen(sys.stdout, sys.stdout if terminal else sys.stderr, styled=terminal and "NO_COLOR" not in os.environ)


class Reader(Protocol):
    """Where messages come from; `interactive` when a person is there to read on after an error."""

    interactive: bool

    def read(self) -> str | None:
        """The next message, without its closing empty line; None at the end of input. KeyboardInterrupt = leave."""
        ...


class LineReader:
    """Messages from a pipe or file: lines up to an empty one or the end."""

    def __init__(self, source: BinaryIO, screen: Screen, *, echo: bool) -> None:
        self._source, self._screen, self._echo = source, screen, echo
        self.interactive = not echo
        self._line = 0

    def read(self) -> str | None:
        """See Reader."""
        self._screen.notes.write("\n" + PROMPT)
        self._screen.notes.flush()
        lines: list[str] = []
        for line in self._lines():
            if line:
                lines.append(line)
            if lines and (not line or lines[0] in ("exit", "end")):
                break
        if self._echo or not lines:
            self._screen.note("\n".join(lines))
        return "\n".join(lines) if lines else None

    def _lines(self) -> Iterator[str]:
        for raw in iter(self._source.readline, b""):
            self._line += 1
            try:
                yield raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as e:
                self._screen.note()
                raise RequestError(
                    f"line {self._line} of the input is not valid UTF-8 (byte 0x{raw[e.start]:02x} at position {e.start}); convert it first"
                ) from e


class TypingReader:
    """Messages typed in a terminal. readline gives editing, arrow keys and history, for any script; where Python lacks it, plain lines remain.

    readline and no full-screen library: the prompt is written once for each message, so recorders and scripted terminals can wait for it.
    """

    interactive = True

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # being imported is its effect: input() uses it

    def read(self) -> str | None:
        """See Reader."""
        self._screen.note()
        lines: list[str] = []
        try:
            while True:
                line = self._line("" if lines else PROMPT)
                if not line and not lines:
                    return ""
                if not line:
                    break
                lines.append(line)
                if lines in (["exit"], ["end"]):
                    break
        except EOFError:
            self._screen.note()
            if not lines:
                return None
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        """One line; what is no text is told and counts as empty."""
        try:
            line = input(prompt)
            line.encode()
            return line
        except UnicodeError:
            self._screen.note("error: that line is not valid UTF-8; type it again")
            return ""


def open_reader(screen: Screen) -> Reader:
    """Line editing when a person types, else plain lines."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TypingReader(screen)
    return LineReader(sys.stdin.buffer, screen, echo=not sys.stdin.isatty())


@dataclass(slots=True)
class _Timing:
    """Clock of one answer."""

    start: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    first_tokens: int = 0  # those that came with the first increment, and are in no interval

    def note(self, response: Response) -> None:
        """One more increment came."""
        self.last = time.monotonic()
        if not self.first:
            self.first, self.first_tokens = self.last, response.generate_token_len
        self.tokens = response.generate_token_len

    def __str__(self) -> str:
        if not self.first:
            return "no tokens"
        later = self.tokens - self.first_tokens
        speed = f"{later / (self.last - self.first):.1f} tokens/s, " if later > 0 and self.last > self.first else ""
        return f"{self.tokens} token{'s' if self.tokens != 1 else ''}, {speed}first after {self.first - self.start:.2f} s"


class Conversation:
    """Reads messages until the end, streams each answer, and keeps the history on this side."""

    def __init__(self, ask: Ask, reader: Reader, screen: Screen, *, session_len: int | None = None) -> None:
        self._ask, self._reader, self._screen = ask, reader, screen
        self._session_len = session_len
        self._unanswered: str | None = None
        self.history: list[Message] = []

    def run(self) -> None:
        """Until `exit`, the end of input, or Ctrl-C at the prompt. When nobody is there to read on, the first error ends it."""
        while True:
            try:
                text = self._reader.read()
            except KeyboardInterrupt:
                self._screen.note()
                return
            if text is None or text.strip() == "exit":
                return
            if text.strip() == "end":
                self.history.clear()
                self._unanswered = None
                self._screen.note("new conversation", dim=True)
            elif text.strip():
                if text.strip() == "again" and self._unanswered is not None:
                    text = self._unanswered
                try:
                    self._turn(text)
                except KeyboardInterrupt:  # between two increments; _answer handles the others
                    if not self._reader.interactive:
                        raise
                    self._screen.note("stopped", dim=True)

    def _turn(self, text: str) -> None:
        """One question and its answer; a stopped answer stays in the history as far as it came, a failed one leaves no trace."""
        messages = [*self.history, {"role": "user", "content": text}]
        self._unanswered = text
        self._screen.note()
        try:
            answer = self._answer(messages)
        except LmdeployError as e:
            if not self._reader.interactive or isinstance(e, EngineError):
                raise
            self._complain(e)
            return
        if answer:
            self.history, self._unanswered = [*messages, {"role": "assistant", "content": answer}], None
        elif self._reader.interactive:
            self._screen.note(REPEAT, dim=True)

    def _complain(self, error: LmdeployError) -> None:
        self._screen.note(f"error: {error}")
        if getattr(error, "code", None) == "context_length_exceeded" and self.history:
            self._screen.note(NEW_CONVERSATION)
        else:
            self._screen.note("type `again` to repeat the question", dim=True)

    def _answer(self, messages: list[Message]) -> str:
        """Stream one answer to the screen; returns its text."""
        timing, pieces = _Timing(), list[str]()
        response: Response | None = None
        aside = stopped = False
        with contextlib.closing(self._ask(messages)) as increments:
            try:
                for item in increments:
                    if isinstance(item, Anew):
                        timing, response = _Timing(), None
                        pieces.clear()
                    elif isinstance(item, Aside):
                        self._screen.aside(item.text)
                        aside = True
                    else:
                        response = item
                        timing.note(response)
                        pieces.append(response.text)
                        if aside and response.text:
                            self._screen.note("\n")
                            aside = False
                        self._screen.answer(response.text)
            except KeyboardInterrupt:
                if not self._reader.interactive:
                    raise
                stopped = True
        self._screen.answer("\n")
        self._screen.note(f"[{timing}{self._ending(response, stopped)}]", dim=True)
        return "".join(pieces)

    def _ending(self, last: Response | None, stopped: bool) -> str:
        """What else the reader of an answer should know."""
        if stopped:
            return "; stopped"
        if last is None or last.finish_reason in ("stop", None):
            return ""
        if last.finish_reason == "error":
            raise RequestError(last.error_message or "the engine failed while answering", code=last.error_code or "engine_error")
        if last.finish_reason == "length":
            if self._session_len and last.input_token_len + last.generate_token_len >= self._session_len:
                return f"; cut: the conversation fills session_len={self._session_len}, {NEW_CONVERSATION}"
            return "; cut at max_new_tokens"
        return f"; {last.finish_reason}"
