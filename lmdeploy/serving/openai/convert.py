"""Wire <-> messages, nothing else: request bodies become prompts and GenerationConfigs, Responses become OpenAI's dicts.

Order of sampling values: the request's, else the model's generation_config.json, else the library's. The server always samples
(do_sample) unless temperature is 0 or top_k is 1. What this version cannot obey is refused here with code 'unsupported'.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.serving.openai.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    GenerateRequest,
    InteractiveRequest,
    OpenAISampling,
    Sampling,
)
from lmdeploy.serving.parsers.tools import INTERPRETER
from lmdeploy.serving.tool_offer import CODE_INTERPRETER
from lmdeploy.serving.turn_call import TurnCall
from lmdeploy.text.tokenizer import Tokenizer
from lmdeploy.vision.prompt import AT

#: field of the wire = field of GenerationConfig; null means "not given"
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
_SAME_OPENAI = ("n", "presence_penalty", "frequency_penalty", "min_new_tokens", "stop_token_ids", "bad_words")
#: fields that ask for what is not built yet, and the values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "adapter_name": (),
    "suffix": ("",),
    "image_url": ([], ""),
}

Prompt = str | list[int] | list[dict[str, Any]]


def refuse_unsupported(request: Any) -> None:
    """Raise RequestError for the first field that this version cannot obey; a field without effect is never silent."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name, None)
        if value is not None and value not in neutral:
            raise RequestError(f"{name} is not available in this version of lmdeploy; leave it out or send null", param=name, code="unsupported")
    if getattr(request, "stream_options", None) is not None and not request.stream:
        raise RequestError("stream_options is only allowed with stream=true", param="stream_options")


def generation_config(request: Sampling, defaults: dict[str, Any], **extra: Any) -> GenerationConfig:
    """What the request asks of the sampler, on top of the model's own defaults."""
    values = dict(defaults)
    names = _SAME + (_SAME_OPENAI if isinstance(request, OpenAISampling) else ())
    values.update({name: getattr(request, name) for name in names if getattr(request, name) is not None})
    values.update({name: value for name, value in extra.items() if value is not None})
    if request.stop:
        values["stop_words"] = [request.stop] if isinstance(request.stop, str) else request.stop
    values["max_new_tokens"] = _max_new_tokens(request)
    values["response_format"] = response_format(request)
    return GenerationConfig(do_sample=True, **values)


#: extra fields as other servers spell them -> type of a response_format, key of its value
_GUIDED = {"guided_json": ("json_schema", "json_schema"), "guided_regex": ("regex_schema", "regex_schema"), "guided_choice": ("choice", "choice"),
           "guided_grammar": ("ebnf", "ebnf")}  # fmt: skip


def response_format(request: Any) -> dict[str, Any] | None:
    """The one form that a request asks of its answer, whichever field says so."""
    given: list[dict[str, Any]] = [form] if (form := getattr(request, "response_format", None)) is not None else []
    for name, (kind, key) in _GUIDED.items():
        if (value := getattr(request, name, None)) is not None:
            if name == "guided_json":
                value = {"name": name, "schema": _schema(value)}
            given.append({"type": kind, key: value})
    if len(given) > 1:
        raise RequestError("response_format and the guided_ fields exclude each other; give one", param="response_format")
    return given[0] if given else None


def _schema(value: dict[str, Any] | str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as e:
        raise RequestError(f"guided_json is not valid JSON: {e}", param="guided_json") from None


def _max_new_tokens(request: Sampling) -> int | None:
    wanted = getattr(request, "max_completion_tokens", None)
    return (wanted if wanted is not None else getattr(request, "max_tokens", None)) or None


def chat_config(request: ChatRequest, defaults: dict[str, Any]) -> GenerationConfig:
    """GenerationConfig of a chat request."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return generation_config(request, defaults, logprobs=logprobs, random_seed=_seed(request.seed), logit_bias=_logit_bias(request))


def completion_config(request: CompletionRequest, defaults: dict[str, Any]) -> GenerationConfig:
    """GenerationConfig of a completions request; with best_of more answers than are asked for, and what ranks them."""
    n, best_of = request.n or 1, request.best_of or 0
    if best_of and best_of < n:
        raise RequestError(f"best_of={best_of} is less than n={n}; it is the number of answers to choose n from", param="best_of")
    if best_of > n and request.stream:
        raise RequestError("best_of cannot be streamed: the best answer is known at the end; use n, or stream=false", param="best_of")
    return generation_config(
        request,
        defaults,
        n=max(n, best_of),
        logprobs=0 if best_of > n and request.logprobs is None else request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        random_seed=_seed(request.seed),
        logit_bias=_logit_bias(request),
    )


def generate_config(request: GenerateRequest, defaults: dict[str, Any]) -> GenerationConfig:
    """GenerationConfig of a /generate request."""
    logprobs = 0 if request.return_logprob else None
    return generation_config(request, defaults, logprobs=logprobs, random_seed=_seed(request.seed), stop_token_ids=request.stop_token_ids)


def interactive_config(request: InteractiveRequest) -> GenerationConfig:
    """GenerationConfig of an interactive request; its own defaults, as it always had."""
    names = ("top_p", "top_k", "temperature", "repetition_penalty", "ignore_eos", "skip_special_tokens")
    values = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return GenerationConfig(do_sample=True, max_new_tokens=request.request_output_len or None, stop_words=stop, **values)


def _seed(seed: int | None) -> int | None:
    """Seeds of any sign are accepted, as OpenAI does; the sampler wants 63 bits."""
    return None if seed is None else seed & ((1 << 63) - 1)


def _logit_bias(request: OpenAISampling) -> dict[int, float] | None:
    out: dict[int, float] = {}
    for key, bias in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit()):
            raise RequestError(f"logit_bias: key {key!r} is not a token id", param="logit_bias")
        out[int(key)] = bias
    return out or None


def chat_prompt(request: ChatRequest) -> tuple[Prompt, bool]:
    """The prompt, and whether the template applies: a plain text is used as it is, as this system always did."""
    if request.input_ids is not None:
        if request.messages:
            raise RequestError("input_ids needs empty messages", param="input_ids")
        return list(request.input_ids), False
    if isinstance(request.messages, str):
        return request.messages, False
    if not request.messages:
        raise RequestError("messages is empty; send at least one message", param="messages", code="empty_messages")
    history = messages_of(request.messages)
    if request.do_preprocess is False:
        if any(isinstance(m["content"], list) for m in history):
            raise RequestError("do_preprocess=False takes no pictures: there is no template to place them", param="messages")
        return "".join(m["content"] for m in history), False
    return history, True


def turn_call(request: ChatRequest, defaults: dict[str, Any]) -> TurnCall:
    """A chat request in the form of no protocol."""
    prompt, templated = chat_prompt(request)
    tools, choice = tool_choice(request.tools, request.tool_choice)
    parallel = request.parallel_tool_calls is not False
    return TurnCall(prompt, chat_config(request, defaults), templated, tools, choice, parallel, template_kwargs(request))


def tool_choice(tools: list[dict[str, Any]] | None, choice: Any) -> tuple[list[dict[str, Any]] | None, str]:
    """The tools that may be called, and the choice in TurnCall's words: OpenAI's texts, a named function, or allowed_tools."""
    if choice is None:
        return tools, "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        entries = allowed.get("tools") if isinstance(allowed, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not isinstance(allowed.get("mode", "auto"), str):
            raise RequestError("tool_choice.allowed_tools must have a mode and a list of tools", param="tool_choice")
        names = [_function_name(entry) for entry in entries]
        if unknown := [name for name in names if name not in [_function_name(tool) for tool in tools or ()]]:
            raise RequestError(f"tool_choice names {unknown[0]!r:.80}, which is not among tools", param="tool_choice")
        return [tool for tool in tools or () if _function_name(tool) in names], tool_choice(tools, allowed.get("mode", "auto"))[1]
    if isinstance(choice, dict) and choice.get("type", "function") in ("function", CODE_INTERPRETER) and (name := _function_name(choice)):
        return tools, f"function:{name}"
    if choice not in ("none", "auto", "required"):
        raise RequestError(f"tool_choice={choice!r:.80} is not 'none', 'auto', 'required', a named function or allowed_tools", param="tool_choice")
    return tools, str(choice)


def _function_name(entry: dict[str, Any]) -> str | None:
    if entry.get("type") == CODE_INTERPRETER:
        return INTERPRETER
    function = entry.get("function", entry)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def template_kwargs(request: ChatRequest) -> dict[str, Any] | None:
    """Extra variables for the checkpoint's own template."""
    extra = dict(request.chat_template_kwargs or {})
    for name in ("enable_thinking", "reasoning_effort"):
        if getattr(request, name) is not None:
            extra.setdefault(name, getattr(request, name))
    return extra or None


def messages_of(wire: list[ChatMessage]) -> list[dict[str, Any]]:
    """OpenAI messages as plain dicts; text parts are joined by newlines, a missing content is ''."""
    return [_message(m, i) for i, m in enumerate(wire)]


def _message(message: ChatMessage, place: int) -> dict[str, Any]:
    where = f"messages.{place}"
    if message.audio is not None:
        raise RequestError(f"{where}.audio: speech is not read; send what was said as content", param=f"{where}.audio", code="unsupported")
    content = content_of(message.content, f"{where}.content")
    if message.refusal:  # what the assistant said, when it would not answer
        content = content if isinstance(content, list) else "\n".join(filter(None, (content, message.refusal)))
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value:
            out[name] = value
    if message.reasoning and "reasoning_content" not in out:
        out["reasoning_content"] = message.reasoning
    if message.function_call is not None:
        out["tool_calls"] = [*out.get("tool_calls", []), _legacy_call(message.function_call, f"{where}.function_call")]
    return out


def _legacy_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """The one call of a message, as OpenAI's API had it before `tool_calls`."""
    name, arguments = call.get("name"), call.get("arguments", "{}")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise RequestError(f"{where}: it needs a name and arguments, both of them texts", param=where)
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def content_of(content: str | list[ContentPart] | None, place: str) -> str | list[dict[str, Any]]:
    """A text; a list of parts where some are pictures."""
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        where = f"{place}.{number}"
        if part.type in ("text", "input_text", "output_text"):
            parts.append({"type": "text", "text": part.text or ""})
        elif part.type not in ("image_url", "input_image"):
            raise RequestError(f"{where}: parts of type {part.type[:40]!r} are not read; send text or image_url", param=where, code="unsupported")
        elif part.image_url is None:
            raise RequestError(f"{where}: a part of type {part.type!r} needs image_url", param=where)
        else:
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            parts.append({"type": "image_url", "image_url": {"url": url}, AT: where})
    return parts if any(p["type"] != "text" for p in parts) else "\n".join(p["text"] for p in parts)


# ---------------------------------------------------------------------- answers


def new_id(prefix: str, joint: str = "-") -> str:
    """A fresh id; newer protocols join with '_'."""
    return f"{prefix}{joint}{uuid.uuid4().hex[:22]}"


def now() -> int:
    """`created` of an answer."""
    return int(time.time())


def usage(prompt: int, completion: int, cached: int, reasoning: int = 0) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def chat_logprobs(ids: list[int], entries: list[dict[int, float]] | None, top: int, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """OpenAI's chat form of the log-probabilities of some generated tokens."""
    if entries is None:
        return None
    content = []
    for token, entry in zip(ids, entries, strict=True):
        best = sorted(entry.items(), key=lambda item: -item[1])[:top]
        content.append({**_token(token, entry[token], tokenizer), "top_logprobs": [_token(i, p, tokenizer) for i, p in best]})
    return {"content": content, "refusal": None}


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


def completion_logprobs(ids: list[int], entries: list[dict[int, float] | None], top: int, tokenizer: Tokenizer, offset: int = 0) -> dict[str, Any]:
    """The older form of /v1/completions; the first prompt token (echo) has no log-probability. Tokens before the text (offset < 0) are at 0."""
    tokens, chosen, tops, offsets = [], [], [], []
    for token, entry in zip(ids, entries, strict=True):
        text = tokenizer.token_bytes(token).decode("utf-8", "replace")
        tokens.append(text)
        offsets.append(max(offset, 0))
        offset += len(text)
        chosen.append(None if entry is None else finite(entry[token]))
        best = sorted(entry.items(), key=lambda item: -item[1])[: max(top, 1)] if entry and top else []
        tops.append({tokenizer.token_bytes(i).decode("utf-8", "replace"): finite(p) for i, p in best} if entry else None)
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops if top else None, "text_offset": offsets}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's floor of -9999 stands for a token that cannot come."""
    return max(logprob, -9999.0)
