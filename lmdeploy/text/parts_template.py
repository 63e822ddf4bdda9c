"""Chat templates made of parts: a system block, a turn per message, and where tools go. The built-in ones are of this kind.

Composition: [prefix] [system block] then header + content + end of each message, then the assistant's header. A last message
of the assistant stays open. The texts of the families are data, in builtin_templates.py; this file knows no family's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from lmdeploy.errors import RequestError
from lmdeploy.text.conversation import RESULT_ROLES, Message

ToolStyle = Literal["none", "plugin", "function_tag", "tool_call"]


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


def render_parts(parts: Parts, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> str:
    """Text of a checked conversation."""
    if tools and parts.tool_style == "none":
        raise RequestError("this chat template has no place for tools; leave tools out or choose another template", param="tools")
    return parts.prefix + "".join(_pieces(parts, messages, tools, add_generation_prompt))


def continue_parts(parts: Parts, text: str) -> str:
    """A further user turn after an answer whose end marker the model itself has written."""
    return f"{parts.separator}{parts.user}{text}{parts.eoh}{parts.assistant}"


def _pieces(parts: Parts, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> list[str]:
    rest = messages
    system = parts.meta
    if messages[0]["role"] == "system":
        system, rest = messages[0]["content"], messages[1:]
    folded = system or "" if parts.system_in_user else ""
    out = [] if parts.system_in_user else [_system_block(parts, system, tools)]
    opened = bool(out and out[0])
    for i, message in enumerate(rest):
        last = i == len(rest) - 1
        role = message["role"]
        if role == "assistant":
            out.append(parts.assistant + _assistant_text(parts, message) + ("" if last and add_generation_prompt else _assistant_end(parts, message)))
        elif role in RESULT_ROLES:
            neighbours = (i > 0 and rest[i - 1]["role"] in RESULT_ROLES, not last and rest[i + 1]["role"] in RESULT_ROLES)
            out.append(_result(parts, message, *neighbours))
        elif role == "system" and not parts.system_in_user:
            out.append(parts.system + message["content"] + parts.eosys)
        else:
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
        calls = [f"<|action_start|><|plugin|>\n{_json({'name': f['name'], 'parameters': f['arguments']})}<|action_end|>" for f in functions]
        return text + "".join(calls)
    if parts.tool_style == "tool_call":
        calls = [f"<tool_call>\n{_json({'name': f['name'], 'arguments': f['arguments']})}\n</tool_call>" for f in functions]
        return "\n".join([text, *calls] if text else calls)
    if parts.tool_style == "function_tag":
        return text + "".join(f"<function={f['name']}>{_json(f['arguments'])}</function>" for f in functions)
    raise RequestError("this chat template has no place for tool_calls; send the content alone or choose another template", param="messages")


def _assistant_end(parts: Parts, message: Message) -> str:
    if parts.tool_style == "function_tag" and (message.get("tool_calls") or "<|python_tag|>" in message["content"] or "</function>" in message["content"]):
        return "<|eom_id|>" + parts.separator
    return parts.eoa + parts.separator


def _result(parts: Parts, message: Message, after_result: bool, before_result: bool) -> str:
    """What a tool gave back. tool_call families collect neighbouring results in one user turn."""
    content: str = message["content"]
    if parts.tool_style == "tool_call":
        opening = "" if after_result else parts.user.rstrip("\n")
        return f"{opening}\n<tool_response>\n{content}\n</tool_response>{'' if before_result else parts.eoh}"
    if parts.tool_style == "plugin":
        name = "plugin" if message["role"] == "tool" else message.get("name")
        suffix = f" name=<|{name}|>" if name in ("plugin", "interpreter") else ""
        return parts.tool.rstrip("\n") + suffix + "\n" + content + parts.eotool
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
