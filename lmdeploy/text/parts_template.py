"""Chat templates made of parts: a system block, a turn per message, and where tools go. The built-in ones are of this kind.

Composition: [prefix] [system block] then header + content + end of each message, then the assistant's header. A last message
of the assistant stays open. The texts of the families are data, in builtin_templates.py; this file knows no family's name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from lmdeploy.errors import RequestError
from lmdeploy.text.conversation import RESULT_ROLES, Message

ToolStyle = Literal["none", "plugin", "function_tag", "tool_call", "tool_list"]
#: a system message of this name says that code may be run; a call and its results of this name are code and what it printed
INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class Parts:
    """The texts of a template. `meta` is the default system text: None prints no system block, '' an empty one."""

    system: str = ""
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    separator: str = ""
    meta: str | None = None
    stop_words: tuple[str, ...] = ()
    prefix: str = ""
    first_user: str | None = None  # header of a first user turn that no system block opens (Llama 2)
    system_in_user: bool = False  # the family has no system turn: its text begins the first user turn
    tool_style: ToolStyle = "none"
    tool: str = ""  # header of a tool's result
    eotool: str = ""
    system_preamble: str = ""  # printed at the beginning of every system block (Llama 3.1's dates)
    no_thinking: str = ""  # what stands for empty reasoning when enable_thinking is false; '' = the family does not think


def render_parts(parts: Parts, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool, thinks: bool = True) -> str:
    """Text of a checked conversation. `thinks` false: the answer begins behind empty reasoning."""
    if tools and parts.tool_style == "none":
        raise RequestError("this chat template has no place for tools; leave tools out or choose another template", param="tools")
    if parts.tool_style == "tool_list":
        messages = short_ids(messages)
    skipped = parts.no_thinking if add_generation_prompt and not thinks and messages[-1]["role"] != "assistant" else ""
    return parts.prefix + "".join(_pieces(parts, messages, tools, add_generation_prompt)) + skipped


def continue_parts(parts: Parts, text: str) -> str:
    """A further user turn after an answer whose end marker the model itself has written."""
    return f"{parts.separator}{parts.user}{text}{parts.eoh}{parts.assistant}"


def _pieces(parts: Parts, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> list[str]:
    rest = messages
    system = parts.meta
    if messages[0]["role"] == "system" and messages[0].get("name") != INTERPRETER:
        system, rest = messages[0]["content"], messages[1:]
    folded = system or "" if parts.system_in_user else ""
    out = [] if parts.system_in_user else [_system_block(parts, system, tools)]
    opened = bool(out and out[0])
    code_calls = _code_calls(rest)
    last_user = max((i for i, message in enumerate(rest) if message["role"] == "user"), default=-1)
    for i, message in enumerate(rest):
        last = i == len(rest) - 1
        role = message["role"]
        if role == "assistant":
            out.append(parts.assistant + _assistant_text(parts, message) + ("" if last and add_generation_prompt else _assistant_end(parts, message)))
        elif role in RESULT_ROLES:
            neighbours = (i > 0 and rest[i - 1]["role"] in RESULT_ROLES, not last and rest[i + 1]["role"] in RESULT_ROLES)
            is_code = message.get("name") == INTERPRETER or message.get("tool_call_id") in code_calls
            out.append(_result(parts, message, is_code, *neighbours))
        elif role == "system" and not parts.system_in_user:
            named = parts.tool_style == "plugin" and message.get("name") == INTERPRETER
            out.append((f"{parts.system.rstrip()} name=<|{INTERPRETER}|>\n" if named else parts.system) + message["content"] + parts.eosys)
        else:
            if i == last_user and tools and parts.tool_style == "tool_list":
                out.append(f"[AVAILABLE_TOOLS] {_json(tools)}[/AVAILABLE_TOOLS]")
            header = parts.user if opened or parts.first_user is None else parts.first_user
            out.append(header + (f"{folded}\n\n" if folded else "") + message["content"] + parts.eoh)
            folded = ""
        opened = True
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        out.append(parts.assistant)
    return out


def _system_block(parts: Parts, system: str | None, tools: list[dict[str, Any]] | None) -> str:
    if parts.tool_style == "tool_call" and tools:
        system = (system or "") + TOOL_CALL_OPEN + "".join("\n" + _json(tool) for tool in tools) + TOOL_CALL_CLOSE
    elif parts.tool_style == "function_tag":
        system = parts.system_preamble + (_function_tag_tools(tools) if tools else "") + (system or "")
    block = "" if system is None else parts.system + system + parts.eosys
    if parts.tool_style == "plugin" and tools:
        functions = [tool["function"] for tool in tools]
        array = _json([{"description": f.get("description"), "name": f["name"], "parameters": f.get("parameters")} for f in functions])
        block += f"{parts.system.rstrip()} name=<|plugin|>\n{array}{parts.eosys}"
    return block


def _assistant_text(parts: Parts, message: Message) -> str:
    """Content and, in the family's own notation, the calls that the assistant made."""
    text: str = message["content"]
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    if not functions:
        return text
    if parts.tool_style == "plugin":
        return text + "".join(_plugin_call(f) for f in functions)
    if parts.tool_style == "tool_list":
        listed = [{"name": c["function"]["name"], "arguments": c["function"]["arguments"], "id": c["id"]} for c in message["tool_calls"]]
        return f"{text}[TOOL_CALLS] {_json(listed)}"
    if parts.tool_style == "tool_call":
        calls = [f"<tool_call>\n{_json({'name': f['name'], 'arguments': f['arguments']})}\n</tool_call>" for f in functions]
        return "\n".join([text, *calls] if text else calls)
    if parts.tool_style == "function_tag":
        return text + "".join(f"<function={f['name']}>{_json(f['arguments'])}</function>" for f in functions)
    raise RequestError("this chat template has no place for tool_calls; send the content alone or choose another template", param="messages")


def _plugin_call(function: dict[str, Any]) -> str:
    if _is_code(function):
        return f"<|action_start|><|{INTERPRETER}|>\n```python\n{function['arguments']['code']}\n```<|action_end|>"
    return f"<|action_start|><|plugin|>\n{_json({'name': function['name'], 'parameters': function['arguments']})}<|action_end|>"


def _is_code(function: dict[str, Any]) -> bool:
    return function["name"] == INTERPRETER and isinstance(function["arguments"].get("code"), str)


def _code_calls(messages: list[Message]) -> set[str]:
    """Ids of the calls that were code."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return {call["id"] for call in calls if isinstance(call.get("id"), str) and _is_code(call["function"])}


def short_ids(messages: list[Message]) -> list[Message]:
    """Mistral's models know ids of nine letters and digits: others become such ones; results without an id belong to the calls in their order."""
    out: list[Message] = []
    waiting: list[str] = []
    for place, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = [{**call, "id": _short(call.get("id") or f"{place}.{i}")} for i, call in enumerate(message["tool_calls"])]
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] in RESULT_ROLES:
            given = message.get("tool_call_id")
            short = _short(given) if given else waiting[0] if waiting else _short(str(place))
            waiting = [other for other in waiting if other != short]
            message = {**message, "tool_call_id": short}
        out.append(message)
    return out


def _short(given: Any) -> str:
    return given if isinstance(given, str) and re.fullmatch("[A-Za-z0-9]{9}", given) else sha256(str(given).encode()).hexdigest()[:9]


def _assistant_end(parts: Parts, message: Message) -> str:
    if parts.tool_style == "function_tag" and (message.get("tool_calls") or "<|python_tag|>" in message["content"] or "</function>" in message["content"]):
        return "<|eom_id|>" + parts.separator
    return parts.eoa + parts.separator


def _result(parts: Parts, message: Message, is_code: bool, after_result: bool, before_result: bool) -> str:
    """What a tool gave back. tool_call families collect neighbouring results in one user turn."""
    content: str = message["content"]
    if parts.tool_style == "tool_call":
        opening = "" if after_result else parts.user.rstrip("\n")
        return f"{opening}\n<tool_response>\n{content}\n</tool_response>{'' if before_result else parts.eoh}"
    if parts.tool_style == "plugin":
        name = INTERPRETER if is_code else "plugin" if message["role"] == "tool" else message.get("name")
        suffix = f" name=<|{name}|>" if name in ("plugin", INTERPRETER) else ""
        return parts.tool.rstrip("\n") + suffix + "\n" + content + parts.eotool
    if parts.tool_style == "tool_list":
        return f"[TOOL_RESULTS] {_json({'content': content, 'call_id': message['tool_call_id']})}[/TOOL_RESULTS]"
    if parts.tool:
        return parts.tool + content + parts.eotool
    raise RequestError(f"this chat template has no place for messages of role {message['role']!r}; use system, user and assistant", param="messages")


def _function_tag_tools(tools: list[dict[str, Any]]) -> str:
    lines = [f"Use the function '{f['name']}' to: {f.get('description') or ''}\n{_json(f)}\n\n" for f in (tool["function"] for tool in tools)]
    return FUNCTION_TAG_OPEN + "".join(lines) + FUNCTION_TAG_CLOSE


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# Formats that the models were trained on, fixed to the letter (lengths and hashes are checked in tests/text).
TOOL_CALL_OPEN = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOL_CALL_CLOSE = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
FUNCTION_TAG_OPEN = (
    "# Tool Instructions\n- Always execute python code in messages that you share.\n"
    "- When looking for real time information use relevant functions if available else fallback to brave_search\n\n\n\n"
    "You have access to the following functions:\n\n"
)
#: our own wording of the format that Llama 3.1's prompt page describes
FUNCTION_TAG_CLOSE = (
    "To call a function, reply with nothing but this, on one line:\n"
    "<function=NAME>ARGUMENTS</function>\n"
    "NAME is the function's name and ARGUMENTS a JSON object of its arguments, for example:\n"
    '<function=example_function_name>{"example_name": "example_value"}</function>\n'
    "Give all required parameters and call one function at a time.\n\n"
)
