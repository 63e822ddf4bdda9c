"""`lmdeploy chat` as a person and as a script use it: a real pseudo-terminal, a real pipe, the real embedded model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from lmdeploy.cli.terminal import PROMPT

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
SMALL = ["--cache-max-entry-count", "100", "--max-prefill-token-num", "128"]  # blocks, and tokens a step: half the time of a start is its largest step
STORY = "Tell me a long story about a fox and a king."
FIGURES = r"\[\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s[^\]]*\]"


def terminal(*flags: str, dimensions: tuple[int, int] = (40, 160)) -> pexpect.spawn:
    """`lmdeploy chat` in a pseudo-terminal, the embedded model, at its first prompt."""
    child = pexpect.spawn(
        sys.executable, ["-m", "lmdeploy", "chat", *SMALL, *flags], env=ENVIRONMENT, encoding="utf-8", timeout=60, dimensions=dimensions, cwd=str(ROOT)
    )
    child.expect_exact(PROMPT)
    return child


@pytest.fixture
def chat() -> Iterator[pexpect.spawn]:
    """A conversation whose answers do not vary."""
    child = terminal("--greedy", "--dtype", "float32")
    yield child
    child.close(force=True)


def ask(child: pexpect.spawn, text: str) -> str:
    """Type a message and two Enters; what the terminal shows until the next prompt."""
    child.send(text + "\r\r")
    child.expect_exact(PROMPT)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", child.before)


def leave(child: pexpect.spawn) -> int:
    """`exit`, and the program's exit code."""
    child.send("exit\r")
    child.expect(pexpect.EOF)
    child.close()
    return int(child.exitstatus)


def piped(data: bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    """`lmdeploy chat` with its input from a pipe."""
    command = [sys.executable, "-m", "lmdeploy", "chat", *flags]
    return subprocess.run(command, input=data, capture_output=True, env=ENVIRONMENT, timeout=120, cwd=ROOT)


def test_start_tells_the_model_the_settings_and_the_memory_bill(chat: pexpect.spawn) -> None:
    shown = chat.before
    assert "embedded" in shown
    for word in ("internlm2", "turbomind", "float32", "session_len 2048", "weights", "KV cache", "100 blocks", "total"):
        assert word in shown, word
    assert leave(chat) == 0


def test_conversation_is_kept_until_end(chat: pexpect.spawn) -> None:
    shown = ask(chat, "My name is Ann.")
    assert re.search(FIGURES, shown), shown
    assert "Ann" in ask(chat, "What is my name?").split("?", 1)[1]
    chat.send("end\r")
    chat.expect_exact(PROMPT)
    assert "new conversation" in chat.before
    assert "Ann" not in ask(chat, "What is my name?").split("?", 1)[1]
    assert leave(chat) == 0


def test_text_is_streamed_as_it_comes(chat: pexpect.spawn) -> None:
    chat.send(STORY + "\r\r")
    pieces = 0
    while "tokens/s" not in (chunk := chat.read_nonblocking(1 << 16, timeout=60)):
        pieces += bool(chunk.strip())
    assert pieces > 10


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    child = terminal("--ignore-eos", "--max-new-tokens", "1500", "--dtype", "float32")
    child.send(STORY + "\r\r")
    child.expect_exact(STORY)  # its echo
    child.expect(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+ [a-z]+")
    child.sendintr()
    child.expect(r"\[\d+ tokens.*stopped\]", timeout=10)
    child.expect_exact(PROMPT, timeout=10)
    child.send("end\r")
    child.expect_exact(PROMPT)
    child.send("Count from 1 to 5.\r\r")
    child.expect(r"1, 2, 3, 4, 5")
    child.sendintr()
    child.expect_exact(PROMPT, timeout=10)
    assert leave(child) == 0


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(chat: pexpect.spawn, key: str) -> None:
    chat.send(key)
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    assert "Traceback" not in chat.before


def test_arrow_up_recalls_the_last_line(chat: pexpect.spawn) -> None:
    ask(chat, "Count from 1 to 5.")
    chat.send("\x1b[A\r\r")  # up, Enter, Enter
    chat.expect_exact(PROMPT)
    assert "1, 2, 3, 4, 5" in chat.before.replace("Count from 1 to 5.", "")


def test_several_lines_are_one_message_and_chinese_is_typed_and_edited(chat: pexpect.spawn) -> None:
    chat.send("你好\r你是谁啊\x7f？\r\r")  # one character of the second line is taken back
    chat.expect(FIGURES)
    shown = chat.before
    assert "你好" in shown
    assert "�" not in shown
    chat.expect_exact(PROMPT)
    assert leave(chat) == 0


def test_a_full_conversation_says_what_to_do() -> None:
    child = terminal("--session-len", "64", "--dtype", "float32", "--greedy")
    long = "Tell me " + "more " * 80
    shown = ask(child, long)
    assert "error: " in shown
    assert "session_len" in shown
    assert "64" in shown
    shown = ask(child, STORY)
    assert "cut" in shown
    assert "`end`" in shown
    shown = ask(child, "And then?")
    assert "error: " in shown
    assert "`end`" in shown
    child.send("end\r")
    child.expect_exact(PROMPT)
    assert "error" not in ask(child, "Count from 1 to 3.")
    assert leave(child) == 0


def test_a_piped_question_is_answered_and_only_the_answer_is_output() -> None:
    done = piped(b"Count from 1 to 20.\n", *SMALL, "--greedy")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == ", ".join(map(str, range(1, 21))) + "."
    notes = done.stderr.decode()
    assert PROMPT in notes
    assert "KV cache" in notes
    assert re.search(FIGURES, notes)


def test_a_pipe_may_hold_a_whole_conversation_and_needs_no_last_newline() -> None:
    done = piped(b"My name is Ann.\n\nWhat is my name?\n\nexit\n\nnever asked", *SMALL, "--greedy", "--backend", "pytorch")
    assert done.returncode == 0, done.stderr.decode()
    assert "Ann" in done.stdout.decode().splitlines()[-1]
    assert done.stderr.decode().count("tokens/s") == 2


def test_empty_input_asks_nothing() -> None:
    done = piped(b"", *SMALL)
    assert done.returncode == 0
    assert done.stdout == b""


def test_same_seed_same_answer() -> None:
    answers = [piped(STORY.encode(), *SMALL, "--seed", seed, "--dtype", "float32", "--max-new-tokens", "40").stdout for seed in ("7", "7", "8")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("flags", "data", "parts"),
    [
        (["/no/such/folder"], b"Hi", ["/no/such/folder"]),
        (["{empty}"], b"Hi", ["{empty}", "config.json"]),
        (["{broken}"], b"Hi", ["{broken}", "JSON"]),
        (["--chat-template", "lama2"], b"Hi", ["lama2", "llama2"]),
        (["--cache-max-entry-count", "0.0000001"], b"Hi", ["cache_max_entry_count"]),
        (["--device", "cuda"], b"Hi", ["cuda"]),
        (SMALL, b"\xff\xfe", ["UTF-8", "line 1"]),
        ([*SMALL, "--session-len", "32"], b"word " * 400, ["session_len", "32"]),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_a_bad_start_is_one_line_and_exit_code_2(flags: list[str], data: bytes, parts: list[str], tmp_path: Path) -> None:
    if "cuda" in flags:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
    places = {"{empty}": str(tmp_path / "empty"), "{broken}": str(tmp_path / "broken")}
    for place in places.values():
        Path(place).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    done = piped(data, *[places.get(f, f) for f in flags])
    last = done.stderr.decode().strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr.decode()
    assert last.startswith("lmdeploy: error: ")
    assert "Traceback" not in done.stderr.decode()
    for part in parts:
        assert places.get(part, part) in last


def test_debug_shows_the_trace_of_a_bad_start() -> None:
    done = piped(b"Hi", "/no/such/folder", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr.decode()
