"""Row A14: a user's script of function calls against a real server (ours, and theirs where it lies beside the repository), and the same conversation in every way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.acceptance import function_calls
from tests.acceptance.commands import Server

SEED = Path(__file__).resolve().parents[2] / "../shared/seeds/course-transcript.txt"


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server") / "log", str(model_folder), "--cache-max-entry-count", "300")
    yield started
    started.stop()


def users_script() -> str | None:
    """The one Python block of the course that reads tool_calls; None where the users' documents are not beside the repository."""
    if not SEED.is_file():
        return None
    (found,) = [block for block in re.findall(r"```[Pp]ython\n(.*?)```", SEED.read_text(encoding="utf-8"), re.DOTALL) if "tool_calls" in block]
    return found


@pytest.mark.parametrize("whose", ["ours", "the users'"] if SEED.is_file() else ["ours"])
def test_a14_the_function_call_script_prints_8_and_16(whose: str, server: Server, tmp_path: Path) -> None:
    path = Path(function_calls.__file__)
    if whose != "ours":
        path = tmp_path / "internlm2_5_func.py"
        path.write_text(str(users_script()).replace("http://0.0.0.0:23333", server.url), encoding="utf-8")
    for _ in range(3):  # it samples, so once might be luck
        done = subprocess.run([sys.executable, str(path), server.url], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line for line in lines if line.isdigit()] == ["8", "16"]
        assert "name='add'" in lines[0] and "finish_reason='tool_calls'" in lines[0]


@pytest.mark.skipif(not SEED.is_file(), reason="the users' documents are not beside the repository")
def test_our_script_has_the_tools_of_the_users() -> None:
    (found,) = re.findall(r"^tools = (\[.*?^\}\])", str(users_script()), re.DOTALL | re.MULTILINE)
    assert json.loads(re.sub(r",\s*([}\]])", r"\1", found.replace("'", '"'))) == function_calls.TOOLS


class Calculator:
    """Plays the conversation to its end, answering every call."""

    def __init__(self, server: Server) -> None:
        self.client = OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0)
        self.model = self.client.models.list().data[0].id
        self.tools = function_calls.TOOLS

    def ask(self, messages: list[dict[str, Any]], **fields: Any) -> tuple[str, list[tuple[str, str, dict[str, int]]], str]:
        """(content, calls as (id, name, arguments), finish reason) of one answer, streamed or not."""
        answer: Any = self.client.chat.completions.create(model=self.model, messages=messages, tools=self.tools, **fields)  # type: ignore[call-overload]
        if not fields.get("stream"):
            message = answer.choices[0].message
            calls = [(c.id, c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]
            return message.content or "", calls, answer.choices[0].finish_reason
        return self._streamed(answer)

    @staticmethod
    def _streamed(chunks: Any) -> tuple[str, list[tuple[str, str, dict[str, int]]], str]:
        content, finish, heads, arguments = "", "", [], list[str]()
        for chunk in chunks:
            choice = chunk.choices[0]
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(heads)
                    heads.append((call.id, call.function.name))
                    arguments.append("")
                arguments[call.index] += call.function.arguments
        return content, [(*head, json.loads(text)) for head, text in zip(heads, arguments, strict=True)], finish


@pytest.fixture(scope="module")
def calculator(server: Server) -> Calculator:
    return Calculator(server)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("role", ["environment", "tool"])
def test_a14_add_and_mul_in_turn(calculator: Calculator, stream: bool, temperature: float, role: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Compute (3+5)*2"}]
    for name, arguments, value in (("add", {"a": 3, "b": 5}, "8"), ("mul", {"a": 8, "b": 2}, "16")):
        content, calls, finish = calculator.ask(messages, stream=stream, temperature=temperature, top_p=0.8, seed=7)
        assert [call[1:] for call in calls] == [(name, arguments)] and finish == "tool_calls"
        assert calls[0][0].startswith("call_")
        if role == "environment":
            messages += [{"role": "assistant", "content": content}, {"role": "environment", "content": value, "name": "plugin"}]
        else:
            call = {"id": calls[0][0], "type": "function", "function": {"name": name, "arguments": json.dumps(calls[0][2])}}
            messages += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": value, "tool_call_id": calls[0][0]}]
    content, calls, finish = calculator.ask(messages, stream=stream, temperature=0.0)
    assert "16" in content and not calls and finish == "stop"


def test_a14_tool_choice_is_obeyed(calculator: Calculator) -> None:
    greeting: list[dict[str, Any]] = [{"role": "user", "content": "Hello! Who are you?"}]
    for seed in range(4):
        for choice, names in (("required", {"add", "mul"}), ({"type": "function", "function": {"name": "mul"}}, {"mul"})):
            content, calls, finish = calculator.ask(
                greeting, tool_choice=choice, temperature=0.8, seed=seed, stream=seed % 2 == 0, parallel_tool_calls=seed < 2
            )
            assert (content, len(calls), finish) == ("", 1, "tool_calls")
            _, name, arguments = calls[0]
            assert name in names and set(arguments) == {"a", "b"} and all(type(value) is int for value in arguments.values())
    question: list[dict[str, Any]] = [{"role": "user", "content": "Compute (3+5)*2"}]
    content, calls, finish = calculator.ask(question, tool_choice="none", temperature=0.0, max_tokens=40)
    assert content and not calls and finish != "tool_calls"


def test_a14_many_calls_with_noise_all_parse_and_fit(calculator: Calculator) -> None:
    question: list[dict[str, Any]] = [{"role": "user", "content": "Compute (3+5)*2"}]
    for seed in range(12):
        _, calls, finish = calculator.ask(question, temperature=2.0, top_p=1.0, seed=seed, max_tokens=300)
        for _, name, arguments in calls:
            assert name in ("add", "mul") and set(arguments) == {"a", "b"} and all(type(value) is int for value in arguments.values())
        assert finish in ("tool_calls", "stop", "length") and bool(calls) == (finish == "tool_calls")
