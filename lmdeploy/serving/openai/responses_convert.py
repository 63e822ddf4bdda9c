"""Responses' items, tools and choices as a `TurnCall`, and a turn's answers as items."""

from __future__ import annotations

from typing import Any

from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.messages import Response
from lmdeploy.serving.openai.convert import chat_logprobs, content_of, new_id, now
from lmdeploy.serving.openai.protocol import ContentPart
from lmdeploy.serving.openai.responses_protocol import FunctionTool, Item, ResponsesRequest
from lmdeploy.serving.turns import TurnAnswer, TurnCall
from lmdeploy.text.tokenizer import Tokenizer

_SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos", "skip_special_tokens")
#: fields that need answers to be kept, or work to go on, after the request; nothing is kept here
_REFUSED = ("background", "context_management", "conversation", "previous_response_id", "prompt")
LOGPROBS = "message.output_text.logprobs"


def turn_call(body: ResponsesRequest, defaults: dict[str, Any]) -> TurnCall:
    """The request in a form that belongs to no protocol. Raises RequestError naming what cannot be obeyed."""
    for name in _REFUSED:
        if getattr(body, name):
            raise RequestError(f"{name} is not available: this server keeps no responses; send the whole conversation as input", param=name, code="unsupported")
    if body.truncation == "auto":
        raise RequestError("truncation='auto' is not available: nothing of a conversation is dropped; send what fits", param="truncation", code="unsupported")
    for name, value in (("moderation", body.moderation), ("text.verbosity", body.text.verbosity if body.text else None)):
        if value not in (None, "medium"):
            raise RequestError(f"{name} is not available in this version of lmdeploy; leave it out", param=name, code="unsupported")
    tools = [_tool(tool, i) for i, tool in enumerate(body.tools or [])]
    choice, tools = _choice(body.tool_choice, tools)
    return TurnCall(
        messages_of(body),
        _gen(body, defaults),
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_kwargs=_template_kwargs(body),
    )


def wants_logprobs(body: ResponsesRequest) -> bool:
    """Asked for by `include`, or by a number of likeliest ones."""
    return LOGPROBS in (body.include or ()) or bool(body.top_logprobs)


def _gen(body: ResponsesRequest, defaults: dict[str, Any]) -> GenerationConfig:
    values = {**defaults, **{name: value for name in _SAME if (value := getattr(body, name)) is not None}}
    return GenerationConfig(
        do_sample=True,
        max_new_tokens=body.max_output_tokens,
        stop_words=[body.stop] if isinstance(body.stop, str) else body.stop,
        random_seed=body.seed,
        logprobs=(body.top_logprobs or 0) if wants_logprobs(body) else None,
        response_format=_response_format(body),
        **values,
    )


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    if form.schema_ is None:
        raise RequestError("text.format.schema: this field is required for type 'json_schema'", param="text.format")
    return {"type": "json_schema", "json_schema": {"name": form.name or "answer", "schema": form.schema_}}


def _template_kwargs(body: ResponsesRequest) -> dict[str, Any] | None:
    """Variables that templates of thinking models know."""
    effort = body.reasoning.effort if body.reasoning else None
    if effort is None:
        return None
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}


def _tool(tool: FunctionTool, place: int) -> dict[str, Any]:
    if tool.type != "function":
        raise RequestError(
            f"tools.{place}: a tool of type {tool.type[:60]!r} runs on OpenAI's servers; only 'function' works here", param="tools", code="unsupported"
        )
    if tool.name is None:
        raise RequestError(f"tools.{place}.name: this field is required", param="tools")
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function: dict[str, Any] = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": {**function, "strict": True} if tool.strict else function}


def _choice(choice: str | dict[str, Any] | None, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The choice in a TurnCall's words, and the tools that it leaves."""
    if choice is None or choice in ("auto", "none", "required"):
        return str(choice or "auto"), tools
    if isinstance(choice, dict):
        kind, name, mode = choice.get("type"), choice.get("name"), choice.get("mode", "auto")
        if kind == "function" and isinstance(name, str):
            return f"function:{name}", tools
        if kind == "allowed_tools" and mode in ("auto", "required") and isinstance(choice.get("tools"), list):
            allowed = {tool.get("name") for tool in choice["tools"] if isinstance(tool, dict) and isinstance(tool.get("name"), str)}
            return mode, [tool for tool in tools if tool["function"]["name"] in allowed]
    raise RequestError(
        f'tool_choice={str(choice)[:80]!r} is not one of auto, none, required, {{"type": "function", "name": ...}}, '
        '{"type": "allowed_tools", "mode": ..., "tools": [...]}',
        param="tool_choice",
    )


# ---------------------------------------------------------------------- items in


def messages_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """OpenAI-shaped messages. What the assistant thought, said and called between two other turns is one message."""
    out: list[dict[str, Any]] = []
    if body.instructions:
        out.append({"role": "system", "content": body.instructions})
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    if not items:
        raise RequestError("input is empty; send a text or at least one item", param="input")
    for place, item in enumerate(items):
        _add(out, item, f"input.{place}")
    return out


def _add(out: list[dict[str, Any]], item: Item, where: str) -> None:
    if item.type == "message":
        role = _need(item.role, f"{where}.role")
        if role == "assistant":
            _assistant(out)["content"] += _text(item.content, f"{where}.content")
        else:
            out.append({"role": "system" if role == "developer" else role, "content": content_of(item.content, f"{where}.content")})
    elif item.type == "function_call":
        function = {"name": _need(item.name, f"{where}.name"), "arguments": _need(item.arguments, f"{where}.arguments")}
        calls = _assistant(out).setdefault("tool_calls", [])
        calls.append({"id": _need(item.call_id, f"{where}.call_id"), "type": "function", "function": function})
    elif item.type == "function_call_output":
        call_id = _need(item.call_id, f"{where}.call_id")
        result = {"role": "tool", "tool_call_id": call_id, "content": _text(item.output, f"{where}.output")}
        known = (call for message in out for call in message.get("tool_calls", ()) if call["id"] == call_id)
        name = next((call["function"]["name"] for call in known), None)
        out.append(result if name is None else {**result, "name": name})
    elif item.type == "reasoning":
        _assistant(out)["reasoning_content"] = _text(item.content or item.summary, where)
    else:
        raise RequestError(f"{where}: an item of type {item.type[:60]!r} cannot be read by this server", param=where, code="unsupported")


def _assistant(out: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end, a new one if another turn is there."""
    if not out or out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": ""})
    return out[-1]


def _text(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type not in ("input_text", "output_text", "text", "reasoning_text", "summary_text"):
            raise RequestError(f"{where}.{number}: this model reads text only, not {part.type[:40]!r}", param=where, code="unsupported")
    return "\n".join(part.text or "" for part in content)


def _need(value: str | None, where: str) -> str:
    if value is None:
        raise RequestError(f"{where}: this field is required", param=where, code="missing_field")
    return value


# ---------------------------------------------------------------------- items out


def message_item(text: str, status: str, item_id: str = "", logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What the assistant says."""
    return {"type": "message", "id": item_id or new_id("msg", "_"), "role": "assistant", "status": status, "content": [text_part(text, logprobs)]}


def text_part(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The one part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def reasoning_item(text: str, status: str, item_id: str = "") -> dict[str, Any]:
    """What the assistant thinks."""
    return {"type": "reasoning", "id": item_id or new_id("rs", "_"), "summary": [], "status": status, "content": [{"type": "reasoning_text", "text": text}]}


def call_item(call_id: str, name: str, arguments: str, status: str, item_id: str = "") -> dict[str, Any]:
    """A function that the client is to run."""
    return {"type": "function_call", "id": item_id or new_id("fc", "_"), "call_id": call_id, "name": name, "arguments": arguments, "status": status}


class TextLogprobs:
    """The log-probabilities of an answer's text, as far as they were asked for: not those of its reasoning and calls. Feed increments in order."""

    def __init__(self, body: ResponsesRequest, tokenizer: Tokenizer) -> None:
        self.wanted = wants_logprobs(body)
        self._top, self._tokenizer = body.top_logprobs or 0, tokenizer
        self._waiting: list[dict[str, Any]] = []  # of tokens whose meaning was not told yet
        self._behind = 0  # how many tokens came before these
        self._rest = b""  # of the token before them, text that was not told yet

    def of(self, content: str, response: Response, reasoning_tokens: int) -> list[dict[str, Any]]:
        """Those of the tokens that `content` was made of; tokens that come later than their text are given with the next one."""
        found = chat_logprobs(response.token_ids, response.logprobs, self._top, self._tokenizer) if self.wanted else None
        self._waiting += found["content"] if found else []
        self._drop(max(reasoning_tokens - self._behind, 0))
        if not content or not self._waiting:
            return []
        pieces = [self._rest, *(bytes(entry["bytes"]) for entry in self._waiting)]
        text, wanted = b"".join(pieces), content.encode()
        begin = max(text.find(wanted), 0)
        end = begin + len(wanted)
        first = last = place = 0
        for piece in pieces:
            first += place + len(piece) <= begin
            last += place < end
            place += len(piece)
        out = self._waiting[max(first - 1, 0) : last - 1]
        self._rest = text[end : sum(map(len, pieces[:last]))]
        self._drop(last - 1)
        return out

    def _drop(self, count: int) -> None:
        self._behind += len(self._waiting[:count])
        del self._waiting[:count]


def items_of(answer: TurnAnswer, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Thoughts, text and calls of a complete answer; one that said nothing has an empty text. Only the last item can be cut short."""
    items: list[dict[str, Any]] = []
    if answer.reasoning:
        items.append(reasoning_item(answer.reasoning, "completed"))
    if answer.content or not (answer.reasoning or answer.tool_calls):
        items.append(message_item(answer.content, "completed", logprobs=logprobs))
    items += [call_item(call.id, call.name, call.arguments, "completed") for call in answer.tool_calls]
    items[-1]["status"] = status_of(answer.finish_reason)
    return items


def status_of(finish_reason: str) -> str:
    """'completed', or 'incomplete' for an answer that a limit or the server's end cut short."""
    return "incomplete" if finish_reason in ("length", "abort") else "completed"


class Draft:
    """The response object, from its creation to its end."""

    def __init__(self, body: ResponsesRequest, model: str, gen: GenerationConfig) -> None:
        self.body = body
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        self._head = {"id": new_id("resp", "_"), "object": "response", "created_at": now(), "model": model}
        self._settings = {
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": gen.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": gen.top_p,
            "truncation": "disabled",
            "user": None,
        }

    def at(self, status: str, output: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
        """The object with this status and output; `usage`, `error` and `incomplete_details` unless given are null."""
        end = {"error": None, "incomplete_details": None, "usage": None, **changes}
        return {**self._head, "status": status, "output": output, **end, **self._settings}

    def ended(self, output: list[dict[str, Any]], finish_reason: str, response: Response, reasoning_tokens: int) -> dict[str, Any]:
        """The complete object."""
        details = {"reason": "max_output_tokens"} if finish_reason == "length" else None
        return self.at(status_of(finish_reason), output, incomplete_details=details, usage=_usage(response, reasoning_tokens))


def _usage(response: Response, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": response.input_token_len,
        "input_tokens_details": {"cached_tokens": response.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": response.generate_token_len,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": response.input_token_len + response.generate_token_len,
    }
