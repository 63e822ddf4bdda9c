"""The terminal conversation with a scripted answerer: history, stopping, errors, figures, and where each line goes."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator

import pytest

from lmdeploy.cli.terminal import PROMPT, Conversation, LineReader, Message, Screen
from lmdeploy.errors import EngineError, RequestError
from lmdeploy.messages import Response


class Script:
    """A reader that gives prepared messages; an exception in the list is raised."""

    def __init__(self, *messages: str | BaseException, interactive: bool = True) -> None:
        self.interactive = interactive
        self._messages = iter(messages)

    def read(self) -> str | None:
        message = next(self._messages, None)
        if isinstance(message, BaseException):
            raise message
        return message


class Model:
    """Answers 're: <last message>' word by word and remembers what it was asked; `fault(n)` may raise before word n."""

    def __init__(self, fault: Callable[[int], None] = lambda word: None, finish: str = "stop") -> None:
        self.asked: list[list[Message]] = []
        self.closed = 0
        self._fault, self._finish = fault, finish

    def __call__(self, messages: list[Message]) -> Generator[Response, None, None]:
        self.asked.append([dict(m) for m in messages])
        words = f"re: {messages[-1]['content']}".split(" ")
        try:
            for i, word in enumerate(words, 1):
                self._fault(i)
                last = i == len(words)
                yield Response(text=word + " " * (not last), generate_token_len=i, input_token_len=5, finish_reason=self._finish if last else None)
        finally:
            self.closed += 1


def talk(model: Model, *messages: str | BaseException, interactive: bool = True, session_len: int | None = None) -> tuple[str, str, Conversation]:
    """Run a conversation; returns what was written as answers and as notes."""
    screen = Screen(io.StringIO(), io.StringIO())
    conversation = Conversation(model, Script(*messages, interactive=interactive), screen, session_len=session_len)
    conversation.run()
    return screen.answers.getvalue(), screen.notes.getvalue(), conversation


def test_answers_are_the_models_text_and_nothing_else() -> None:
    answers, notes, _ = talk(Model(), "hello there")
    assert answers == "re: hello there\n"
    assert "3 tokens" in notes


def test_history_goes_along_and_end_begins_anew() -> None:
    model = Model()
    talk(model, "one", "two", "end", "three")
    assert [[m["content"] for m in asked] for asked in model.asked] == [["one"], ["one", "re: one", "two"], ["three"]]
    assert [m["role"] for m in model.asked[1]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("leave", ["exit", None, KeyboardInterrupt()])
def test_exit_end_of_input_and_ctrl_c_at_the_prompt_leave(leave: str | BaseException | None) -> None:
    model = Model()
    messages = [m for m in ("one", leave, "never asked") if m is not None]
    talk(model, *(messages if leave is not None else messages[:1]))
    assert len(model.asked) == 1


def test_blank_messages_are_not_asked() -> None:
    model = Model()
    talk(model, "", "  \n ", "one")
    assert len(model.asked) == 1


def stop_at(word: int) -> Callable[[int], None]:
    """Ctrl-C just before this word of the first answer."""
    state = {"armed": True}

    def fault(i: int) -> None:
        if state["armed"] and i == word:
            state["armed"] = False
            raise KeyboardInterrupt

    return fault


def test_ctrl_c_stops_the_answer_keeps_its_beginning_and_the_program_goes_on() -> None:
    model = Model(stop_at(3))
    answers, notes, _ = talk(model, "a b c", "next")
    assert answers == "re: a \nre: next\n"
    assert "stopped" in notes
    assert [m["content"] for m in model.asked[1]] == ["a b c", "re: a ", "next"]
    assert model.closed == 2, "a stopped answer is closed, so that the engine stops working on it"


def test_ctrl_c_before_the_first_word_leaves_no_trace() -> None:
    model = Model(stop_at(1))
    talk(model, "a", "next")
    assert [m["content"] for m in model.asked[1]] == ["next"]


def test_ctrl_c_ends_a_run_that_nobody_watches() -> None:
    with pytest.raises(KeyboardInterrupt):
        talk(Model(stop_at(2)), "a b c", interactive=False)


def failing(error: Exception) -> Callable[[int], None]:
    """Fails before the second word of the first answer."""
    state = {"armed": True}

    def fault(i: int) -> None:
        if state["armed"] and i == 2:
            state["armed"] = False
            raise error

    return fault


def test_a_refused_message_is_told_and_forgotten() -> None:
    model = Model(failing(RequestError("the prompt has 9 tokens, limit 8", code="context_length_exceeded")))
    _, notes, _ = talk(model, "too long", "short")
    assert "error: the prompt has 9 tokens, limit 8" in notes
    assert [m["content"] for m in model.asked[1]] == ["short"]


def test_a_full_conversation_offers_end() -> None:
    refusals = {"on": False}

    def fault(i: int) -> None:
        if refusals["on"]:
            raise RequestError("full", code="context_length_exceeded")
        refusals["on"] = i == 2

    _, notes, _ = talk(Model(fault), "one", "two")
    assert "`end`" in notes


def test_errors_end_a_run_that_nobody_watches() -> None:
    with pytest.raises(RequestError, match="bad"):
        talk(Model(failing(RequestError("bad"))), "a b", interactive=False)


def test_a_dead_engine_ends_every_run() -> None:
    with pytest.raises(EngineError, match="gone"):
        talk(Model(failing(EngineError("gone"))), "a b", "next")


def test_a_cut_answer_says_which_limit_cut_it() -> None:
    _, notes, _ = talk(Model(finish="length"), "a b")
    assert "cut at max_new_tokens" in notes
    _, notes, _ = talk(Model(finish="length"), "a b", session_len=8)
    assert "session_len=8" in notes
    assert "`end`" in notes


def test_an_answer_that_failed_inside_the_engine_is_an_error() -> None:
    _, notes, conversation = talk(Model(finish="error"), "a b")
    assert "error: the engine failed while answering" in notes
    assert conversation.history == []


def test_figures_after_an_answer_are_dim_only_where_style_is_wanted() -> None:
    for styled in (True, False):
        screen = Screen(io.StringIO(), io.StringIO(), styled)
        Conversation(Model(), Script("a b"), screen).run()
        assert ("\x1b[2m[3 tokens" in screen.notes.getvalue()) is styled


def lines(data: bytes, *, echo: bool = True) -> tuple[list[str], str]:
    """All messages that a LineReader finds, and its notes."""
    screen = Screen(io.StringIO(), io.StringIO())
    reader = LineReader(io.BytesIO(data), screen, echo=echo)
    return list(iter(reader.read, None)), screen.notes.getvalue()


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (b"Hi\n", ["Hi"]),
        (b"Hi", ["Hi"]),
        (b"", []),
        (b"\n\n\n", []),
        (b"a\nb\n\nc\n", ["a\nb", "c"]),
        (b"\n\na\r\n\r\nb\r\n", ["a", "b"]),
        (b"end\nHi\n", ["end", "Hi"]),
        ("讲个故事\n\n再讲一个\n".encode(), ["讲个故事", "再讲一个"]),
    ],
)
def test_piped_messages_end_at_an_empty_line_or_the_end(data: bytes, messages: list[str]) -> None:
    assert lines(data)[0] == messages


def test_the_prompt_stands_once_before_each_message() -> None:
    assert lines(b"a\n\nb\n")[1].count(PROMPT) == 3  # the third meets the end of input
    assert PROMPT == "double enter to end input >>> "


def test_piped_bytes_that_are_no_text_are_an_error_with_line_and_place() -> None:
    with pytest.raises(RequestError, match="line 2 .*UTF-8.*0xff at position 1"):
        lines(b"fine\na\xff\n")
