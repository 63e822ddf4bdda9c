"""The door for chat messages: whatever a caller sent becomes a fresh list of plain, bounded messages, or a RequestError.

Past it every message has a known `role` and a `content` that is a str; tool-call arguments are objects. Callers' lists
are never changed. Templates may rely on it and check nothing.
"""

from __future__ import annotations

import json
from typing import Any

from lmdeploy.errors import RequestError

ROLES = ("system", "user", "assistant", "tool", "environment", "ipython", "developer")
RESULT_ROLES = ("tool", "environment", "ipython")
MAX_MESSAGES = 10_000
MAX_TOOLS = 1024
MAX_CONTENT_BYTES = 16 << 20
MAX_DEPTH = 64

Message = dict[str, Any]


def messages_to_bounded(messages: Any, *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_CONTENT_BYTES) -> list[Message]:
    """Checked copies: `developer` -> `system`, content parts joined by newlines, None -> ''."""
    if not isinstance(messages, (list, tuple)):
        raise RequestError(f"messages must be a list of messages, not {type(messages).__name__}", param="messages")
    if not messages:
        raise RequestError("messages is empty; give at least one message", param="messages")
    if len(messages) > max_messages:
        raise RequestError(f"messages has {len(messages)} entries; at most {max_messages} are accepted", param="messages")
    budget = _Budget(max_bytes)
    return [_message(m, f"messages[{i}]", budget) for i, m in enumerate(messages)]


def tools_to_bounded(tools: Any, *, max_bytes: int = MAX_CONTENT_BYTES) -> list[dict[str, Any]] | None:
    """Checked copies of OpenAI tools `{"type": "function", "function": {...}}`; bare functions are wrapped; [] counts as None."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or len(tools) > MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {MAX_TOOLS} functions", param="tools")
    budget = _Budget(max_bytes, "tools")
    copies = []
    for i, tool in enumerate(tools):
        copy = _copy(tool, f"tools[{i}]", budget, 0)
        function = copy.get("function", copy) if isinstance(copy, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"tools[{i}] must be an object with function.name, a text", param=f"tools[{i}].function.name")
        copies.append(copy if "function" in copy else {"type": "function", "function": function})
    return copies or None


class _Budget:
    """Bytes that the texts of one request may still take."""

    def __init__(self, limit: int, what: str = "messages") -> None:
        self.limit, self.left, self.what = limit, limit, what

    def take(self, text: str, where: str) -> str:
        try:
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
        except UnicodeEncodeError as e:
            raise RequestError(f"{where} is not valid Unicode: a lone surrogate at position {e.start}", param=where) from e
        self.spend(size)
        return text

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise RequestError(f"{self.what}: more than {self.limit} bytes of content; shorten the conversation", param=self.what)


def _message(message: Any, where: str, budget: _Budget) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content, not {type(message).__name__}", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = f"{role[:40]!r}" if isinstance(role, str) else f"{type(role).__name__}" if role is not None else "missing"
        raise RequestError(f"{where}.role is {shown}; allowed are {', '.join(ROLES)}", param=f"{where}.role")
    calls = message.get("tool_calls")
    if "content" not in message and not calls:
        raise RequestError(f"{where} has no content", param=f"{where}.content")
    copy: Message = {"role": "system" if role == "developer" else role}
    copy["content"] = _content(message.get("content"), f"{where}.content", budget)
    for key, value in message.items():
        if not isinstance(key, str):
            raise RequestError(f"{where} has a key that is not a text", param=where)
        if key not in ("role", "content", "tool_calls") and value is not None:
            copy[budget.take(key, where)] = _copy(value, f"{where}.{key[:40]}", budget, 0)
    if calls:
        copy["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls", budget)
    if "name" in copy and not isinstance(copy["name"], str):
        raise RequestError(f"{where}.name must be a text", param=f"{where}.name")
    return copy


def _content(content: Any, where: str, budget: _Budget) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return budget.take(content, where)
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of parts, not {type(content).__name__}", param=where)
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(budget.take(part["text"], f"{where}[{i}].text"))
        elif isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise RequestError(f"{where}[{i}]: parts of type {part['type'][:40]!r} need a vision model; this one takes text", param=f"{where}[{i}].type")
        else:
            raise RequestError(f"{where}[{i}] must be {{'type': 'text', 'text': a text}}", param=f"{where}[{i}]")
    budget.spend(len(texts))
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str, budget: _Budget) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise RequestError(f"{where} must be a list, not {type(calls).__name__}", param=where)
    copies = []
    for i, call in enumerate(calls):
        copy = _copy(call, f"{where}[{i}]", budget, 0)
        function = copy.get("function", copy) if isinstance(copy, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] must be an object with function.name, a text", param=f"{where}[{i}].function.name")
        function["arguments"] = _arguments(function.get("arguments", function.get("parameters")), f"{where}[{i}].function.arguments")
        copies.append(copy if "function" in copy else {"type": "function", "function": function})
    return copies


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """Templates print arguments as JSON, so a JSON text must be parsed first or it would be quoted twice."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise RequestError(f"{where} is not valid JSON: {e}", param=where) from e
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON object, not {type(value).__name__}", param=where)
    return value


def _copy(value: Any, where: str, budget: _Budget, depth: int) -> Any:
    """A copy of JSON-like data: templates may loop over it, so its size counts."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{where} is nested deeper than {MAX_DEPTH} levels", param=where)
    if isinstance(value, str):
        return budget.take(value, where)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple, dict)):
        budget.spend(1 + len(value))
    if isinstance(value, (list, tuple)):
        return [_copy(item, where, budget, depth + 1) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {budget.take(key, where): _copy(item, where, budget, depth + 1) for key, item in value.items()}
    raise RequestError(f"{where} holds a {type(value).__name__}; only JSON values are accepted", param=where)
