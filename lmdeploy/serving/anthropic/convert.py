"""Anthropic's messages, tools and choices as a `TurnCall`, and a complete answer as Anthropic's content blocks."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.messages import Response
from lmdeploy.serving.anthropic.protocol import Block, Content, CountRequest, Message, MessagesRequest, Tool
from lmdeploy.serving.openai.convert import new_id
from lmdeploy.serving.turns import TurnAnswer, TurnCall
from lmdeploy.vision.prompt import AT

T = TypeVar("T")

#: thinking blocks carry a signature that clients send back; ours proves nothing
SIGNATURE = "lmdeploy-local"
_SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos", "skip_special_tokens")


def turn_call(body: CountRequest, defaults: dict[str, Any]) -> TurnCall:
    """The request in a form that belongs to no protocol. Raises RequestError naming what cannot be obeyed."""
    tools = [_tool(tool, i) for i, tool in enumerate(body.tools or [])]
    choice = body.tool_choice
    words = {"auto": "auto", "any": "required", "none": "none", "tool": "function:"}
    wanted = words[choice.type] if choice else "auto"
    if choice and choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice.name: type 'tool' needs the name of a tool", param="tool_choice")
        wanted += choice.name
    return TurnCall(
        messages_of(body),
        _gen(body, defaults),
        tools=tools or None,
        tool_choice=wanted,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        template_kwargs=_template_kwargs(body),
    )


def _gen(body: CountRequest, defaults: dict[str, Any]) -> GenerationConfig:
    if not isinstance(body, MessagesRequest):
        return GenerationConfig()
    values = {**defaults, **{name: value for name in _SAME if (value := getattr(body, name)) is not None}}
    form = body.output_config.format if body.output_config else None
    return GenerationConfig(
        do_sample=True,
        max_new_tokens=body.max_tokens,
        stop_words=body.stop_sequences,
        random_seed=body.seed,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema_}} if form else None,
        **values,
    )


def _template_kwargs(body: CountRequest) -> dict[str, Any] | None:
    """Variables that templates of thinking models know."""
    values: dict[str, Any] = {}
    if body.thinking and body.thinking.type != "adaptive":
        values["enable_thinking"] = body.thinking.type == "enabled"
    if body.output_config and body.output_config.effort:
        values["reasoning_effort"] = body.output_config.effort
    return values or None


def _tool(tool: Tool, place: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(f"tools.{place}: a tool of type {tool.type[:60]!r} runs on Anthropic's servers; only 'custom' ones work here", param="tools")
    if tool.input_schema is None:
        raise RequestError(f"tools.{place}.input_schema: this field is required", param="tools")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": True} if tool.strict else function}


# ---------------------------------------------------------------------- messages


def messages_of(body: CountRequest) -> list[dict[str, Any]]:
    """OpenAI-shaped messages: tool results become turns of their own, in the order in which they stand."""
    out: list[dict[str, Any]] = []
    if body.system:
        out.append({"role": "system", "content": _text(body.system, "system")})
    names: dict[str, str] = {}  # of the tools that were called, by id
    for place, message in enumerate(body.messages):
        where = f"messages.{place}"
        if isinstance(message.content, str) or message.role == "system":
            out.append({"role": message.role, "content": _text(message.content, where)})
        elif message.role == "assistant":
            out.append(_assistant(message.content, where, names))
        else:
            out += _user(message, where, names)
    return out


def _assistant(blocks: list[Block], where: str, names: dict[str, str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        here = f"{where}.content.{number}"
        if block.type == "text":
            texts.append(_need(block.text, f"{here}.text"))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            call_id, name = _need(block.id, f"{here}.id"), _need(block.name, f"{here}.name")
            names[call_id] = name
            calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(block.input or {}, ensure_ascii=False)}})
        elif block.type != "redacted_thinking":  # which nobody here can read
            raise _unsupported(block, here)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(message: Message, where: str, names: dict[str, str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(message.content):
        assert isinstance(block, Block)
        here = f"{where}.content.{number}"
        if block.type == "text":
            parts.append({"type": "text", "text": _need(block.text, f"{here}.text")})
            continue
        if block.type == "image":
            parts.append(_picture(block, here))
            continue
        if block.type != "tool_result":
            raise _unsupported(block, here)
        if parts:
            out.append(_turn(parts))
            parts = []
        call_id = _need(block.tool_use_id, f"{here}.tool_use_id")
        result = {"role": "tool", "tool_call_id": call_id, "content": _result(block, here)}
        out.append({**result, "name": names[call_id]} if call_id in names else result)
    if parts or not out:
        out.append(_turn(parts))
    return out


def _turn(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A user's turn: a text, or parts where some are pictures."""
    pictures = any(part["type"] != "text" for part in parts)
    return {"role": "user", "content": parts if pictures else "\n".join(part["text"] for part in parts)}


def _picture(block: Block, where: str) -> dict[str, Any]:
    source = _need(block.source, f"{where}.source")
    if source.type == "url":
        return {"type": "image_url", "image_url": {"url": _need(source.url, f"{where}.source.url")}, AT: where}
    kind, data = _need(source.media_type, f"{where}.source.media_type"), _need(source.data, f"{where}.source.data")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}, AT: where}


def _result(block: Block, where: str) -> str:
    if isinstance(block.content, dict):
        raise RequestError(f"{where}.content: a text or a list of blocks is needed", param=where)
    text = _text(block.content or "", where)
    return text or ("error" if block.is_error else "")


def _text(content: Content, where: str) -> str:
    """The text of a content that may hold nothing else."""
    if isinstance(content, str):
        return content
    texts = []
    for number, block in enumerate(content):
        if block.type != "text":
            raise _unsupported(block, f"{where}.content.{number}")
        texts.append(_need(block.text, f"{where}.content.{number}.text"))
    return "\n".join(texts)


def _need(value: T | None, where: str) -> T:
    if value is None:
        raise RequestError(f"{where}: this field is required", param=where, code="missing_field")
    return value


def _unsupported(block: Block, where: str) -> RequestError:
    return RequestError(f"{where}: this model reads text and tool results here, not {block.type[:40]!r}", param=where, code="unsupported")


# ---------------------------------------------------------------------- answers


def message(model: str, content: list[dict[str, Any]], usage: dict[str, Any], stop: tuple[str | None, str | None] = (None, None)) -> dict[str, Any]:
    """Anthropic's message object."""
    return {
        "id": new_id("msg", "_"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": stop[0],
        "stop_sequence": stop[1],
        "usage": usage,
    }


def blocks_of(answer: TurnAnswer) -> list[dict[str, Any]]:
    """Thoughts, text and calls of a complete answer; one that said nothing has an empty text."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": SIGNATURE})
    if answer.content or not (answer.reasoning or answer.tool_calls):
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_of(call.arguments)})
    return blocks


def arguments_of(text: str) -> dict[str, Any]:
    """`input` is an object on this wire; a call that was cut short may not be one."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def stop_of(finish_reason: str, response: Response, body: MessagesRequest) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence)."""
    if finish_reason == "tool_calls":
        return "tool_use", None
    if finish_reason == "length":
        return ("max_tokens" if response.generate_token_len >= body.max_tokens else "model_context_window_exceeded"), None
    if finish_reason == "abort":
        return "pause_turn", None  # the server stopped it; the turn may be continued
    if isinstance(response.stop_reason, str) and response.stop_reason in (body.stop_sequences or ()):
        return "stop_sequence", response.stop_reason
    return "end_turn", None


def usage_of(response: Response) -> dict[str, Any]:
    """Counts; on this wire cached tokens are not part of `input_tokens`."""
    return {
        "input_tokens": response.input_token_len - response.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": response.cached_tokens,
        "output_tokens": response.generate_token_len,
    }
