"""Messages -> the prompt text that a checkpoint was trained on: its own Jinja template first, else a built-in one.

`load_chat_template` decides once, from what the checkpoint is and what the caller overrides. Rendering is pure: the same
messages give the same text, the caller's lists are never changed, bad messages raise RequestError naming the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import jinja2

from lmdeploy.config import ChatTemplateConfig
from lmdeploy.errors import CheckpointError, ConfigError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.spec import ModelSpec
from lmdeploy.text.builtin_templates import BUILTIN, kind_of, list_templates
from lmdeploy.text.conversation import RESULT_ROLES, Message, messages_to_bounded, tools_to_bounded
from lmdeploy.text.jinja_sandbox import MAX_SOURCE, BoundedEnvironment, TemplateLimitError, TemplateRefusal
from lmdeploy.text.parts_template import INTERPRETER, Parts, ToolStyle, continue_parts, render_parts, short_ids
from lmdeploy.text.tokenizer import Tokenizer
from lmdeploy.text.tokenizer_files import read_bounded, read_json

__all__ = ["ChatTemplate", "list_templates", "load_chat_template", "messages_to_bounded"]
logger = get_logger(__name__)

#: fields of ChatTemplateConfig that are texts of a built-in template
PART_FIELDS = ("system", "eosys", "user", "eoh", "assistant", "eoa", "separator", "tool", "eotool")
#: end-of-turn tokens of many families: a checkpoint whose template writes one stops at it
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|action_end|>", "<|eot|>", "<eoa>", "<|end_of_text|>")
#: whose text comes from outside
FOREIGN_ROLES = ("user", *RESULT_ROLES)
RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"))
#: marks where an open last message ends in the rendered text (private-use characters; the last occurrence counts)
OPEN_END = "\ue0f2lmdeploy\ue0f3"


class ChatTemplate(ABC):
    """How one model wants its conversations written. `stop_words` are matched on text, `stop_token_ids` are single special tokens."""

    def __init__(self, name: str, stop_words: list[str], tokenizer: Tokenizer, *, default_system: str | None, completion: bool) -> None:
        self.name = name
        self.source = ""  # the checkpoint's own template, with its variant for tools
        self.tool_style: ToolStyle = "none"  # how the built-in parts write tools, where they do
        self.thinks = False  # reasoning comes before the answer, unless enable_thinking is false
        self.default_system = default_system
        self.completion = completion
        self._guard = tokenizer.guard
        ids = {word: tokenizer.added_token_id(word) for word in stop_words}
        self.stop_words = [word for word, token_id in ids.items() if token_id is None]
        self.stop_token_ids = [token_id for token_id in ids.values() if token_id is not None]

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
        guard_special: bool = False,
    ) -> str:
        """The prompt text. With `add_generation_prompt` it ends where the answer begins; a last message of the assistant is continued.

        `guard_special`: special tokens written by users and tools are marked (`Tokenizer.guard`), so that they cannot forge turns.
        """
        checked = messages_to_bounded(messages)
        if guard_special:
            checked = [{**m, "content": self._guard(m["content"])} if m["role"] in FOREIGN_ROLES else m for m in checked]
        return self._render(checked, tools_to_bounded(tools), add_generation_prompt, _check_kwargs(template_kwargs))

    def prompt_from_text(self, text: str, first: bool = True) -> str:
        """A user's text as a prompt; not `first`: as a further turn after an answer that ended with its stop token."""
        if self.completion:
            return text
        messages = messages_to_bounded([{"role": "user", "content": text}])
        return self._render(messages, None, True, {}) if first else self._continue(messages[0]["content"])

    @abstractmethod
    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool, kwargs: dict[str, Any]) -> str: ...

    @abstractmethod
    def _continue(self, text: str) -> str: ...


class BuiltinChatTemplate(ChatTemplate):
    """A template made of parts."""

    def __init__(self, name: str, parts: Parts, tokenizer: Tokenizer, completion: bool = False) -> None:
        super().__init__(name, list(parts.stop_words), tokenizer, default_system=parts.meta, completion=completion)
        self.parts, self.tool_style, self.thinks = parts, parts.tool_style, bool(parts.no_thinking)

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool, kwargs: dict[str, Any]) -> str:
        return render_parts(self.parts, messages, tools, add_generation_prompt, kwargs.get("enable_thinking") is not False)

    def _continue(self, text: str) -> str:
        return continue_parts(self.parts, text)


class JinjaChatTemplate(ChatTemplate):
    """The checkpoint's own template. Conversations with tools that it has no place for are written by the built-in `stand_in`, if there is one."""

    def __init__(
        self,
        source: JinjaSource,
        tokenizer: Tokenizer,
        *,
        stop_words: list[str],
        default_system: str | None = None,
        stand_in: Parts | None = None,
        completion: bool = False,
    ) -> None:
        super().__init__("checkpoint", stop_words, tokenizer, default_system=default_system, completion=completion)
        self._source, self._stand_in = source, stand_in
        self.source = source.default + (source.tool_use or "")
        self.tool_style = stand_in.tool_style if stand_in is not None else "none"
        self.thinks = "</think>" in self.source
        self._environment = BoundedEnvironment()
        self._plain = _compile(self._environment, source.default, source.where)
        self._with_tools = _compile(self._environment, source.tool_use, source.where) if source.tool_use else self._plain
        self._tokens = dict(tokenizer.named_tokens)
        self._ends = [*stop_words, *([self._tokens["eos_token"]] if "eos_token" in self._tokens else [])]

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None, add_generation_prompt: bool, kwargs: dict[str, Any]) -> str:
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        source = self._source.tool_use if tools and self._source.tool_use else self._source.default
        if missing := _missing_places(source, messages, tools):
            if self._stand_in is None:
                raise RequestError(f"the checkpoint's chat template has no place for {missing}; leave it out or choose a built-in template", param="messages")
            return render_parts(self._stand_in, messages, tools, add_generation_prompt, kwargs.get("enable_thinking") is not False)
        if "[TOOL_CALLS]" in source:
            messages = short_ids(messages)
        messages = _spell_results(source, messages)
        is_open = add_generation_prompt and messages[-1]["role"] == "assistant"
        if is_open:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + OPEN_END}]
        template = self._with_tools if tools else self._plain
        text = self._run(
            template, {**self._tokens, **kwargs, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt and not is_open}
        )
        if not is_open:
            return text
        if OPEN_END not in text:
            raise RequestError("the checkpoint's chat template drops the last assistant message, so it cannot be continued", param="messages")
        return text[: text.rindex(OPEN_END)]

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        try:
            return self._environment.render_bounded(template, variables)
        except TemplateRefusal as e:
            raise RequestError(f"the chat template refuses these messages: {e}", param="messages") from e
        except TemplateLimitError as e:
            raise RequestError(f"the chat template of {self._source.where} needs {e}; rendering was stopped", param="messages", code="template_limit") from e
        except Exception as e:  # a template can fail in any way on messages that its author did not think of
            raise RequestError(
                f"the chat template of {self._source.where} fails on these messages: {type(e).__name__}: {str(e)[:300]}", param="messages"
            ) from e

    def _continue(self, text: str) -> str:
        """What the template writes after an answer, without the end marker that the model has written itself."""
        turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": OPEN_END}, {"role": "user", "content": text}]
        rendered = self._run(self._plain, {**self._tokens, "messages": turns, "tools": None, "add_generation_prompt": True})
        if OPEN_END not in rendered:
            return self._render([{"role": "user", "content": text}], None, True, {})
        after = rendered.split(OPEN_END, 1)[1]
        end = next((e for e in sorted(self._ends, key=len, reverse=True) if after.startswith(e)), "")
        return after[len(end) :]


@dataclasses.dataclass(frozen=True, slots=True)
class JinjaSource:
    """The template texts of a checkpoint; `tool_use` is its variant for conversations with tools, if it has one."""

    where: str
    default: str
    tool_use: str | None = None


def load_chat_template(folder: Path, spec: ModelSpec | None, tokenizer: Tokenizer, config: ChatTemplateConfig | None = None) -> ChatTemplate:
    """The template of a model folder; `config` may name a built-in one or override parts."""
    config = config or ChatTemplateConfig()
    if config.capability in ("infilling", "python"):
        raise ConfigError(f"chat template: capability={config.capability!r} is not available in this version of lmdeploy; use 'chat' or 'completion'")
    completion = config.capability == "completion"
    kind = kind_of(spec, lambda text: tokenizer.added_token_id(text) is not None, tokenizer.strip_first_space)
    named = config.model_name if config.model_name not in (None, "hf") else None
    overrides_parts = any(getattr(config, name) is not None for name in PART_FIELDS)
    source = find_jinja_source(Path(config.model_path) if config.model_path else folder)
    if named is None and source is not None and not overrides_parts:
        stops = list(config.stop_words) if config.stop_words is not None else _jinja_stops(source, kind, tokenizer)
        stand_in = BUILTIN[kind] if BUILTIN[kind].tool_style != "none" else None
        if stand_in is not None:
            stand_in = dataclasses.replace(stand_in, meta=config.meta_instruction)
        return JinjaChatTemplate(source, tokenizer, stop_words=stops, default_system=config.meta_instruction, stand_in=stand_in, completion=completion)
    if config.model_name == "hf" and source is None:
        raise ConfigError(
            f"chat template: model_name='hf' asks for the checkpoint's own template, but {folder} has none; built-in ones: {', '.join(list_templates())}"
        )
    if named is None and config.capability is None and not overrides_parts:
        _tell_choice(folder, kind)
    name = named or kind
    return BuiltinChatTemplate(name, _overridden(_builtin(name), config), tokenizer, completion)


def find_jinja_source(folder: Path) -> JinjaSource | None:
    """chat_template.jinja, tokenizer_config.json's chat_template (one, or a list of named ones), chat_template.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return JinjaSource(str(path), read_bounded(path, MAX_SOURCE).decode("utf-8"))
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{path} is not UTF-8 text: {e}") from e
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder / name).get("chat_template")
        if found:
            return _source_of(found, f"{folder / name}")
    return None


def _source_of(value: Any, where: str) -> JinjaSource:
    """A text, a list of {name, template}, or an object of them."""
    if isinstance(value, str):
        named = {"default": value}
    elif isinstance(value, dict):
        named = {k: v for k, v in value.items() if isinstance(v, str)}
    else:
        entries = value if isinstance(value, list) else []
        named = {e["name"]: e["template"] for e in entries if isinstance(e, dict) and isinstance(e.get("name"), str) and isinstance(e.get("template"), str)}
    if not named:
        raise CheckpointError(f"{where}: chat_template is neither a text nor a list of named texts")
    default = named.get("default") or next(iter(named.values()))
    for text in (default, named.get("tool_use") or ""):
        if len(text) > MAX_SOURCE:
            raise CheckpointError(f"{where}: chat_template has {len(text)} characters; at most {MAX_SOURCE} are accepted")
    return JinjaSource(where, default, named.get("tool_use"))


def _compile(environment: BoundedEnvironment, source: str, where: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise CheckpointError(f"{where}: chat_template line {e.lineno}: {e.message}") from e
    except (RecursionError, MemoryError, ValueError, OverflowError, SyntaxError) as e:
        raise CheckpointError(f"{where}: chat_template cannot be compiled: {type(e).__name__}: {str(e)[:200]}") from e


def _jinja_stops(source: JinjaSource, kind: str, tokenizer: Tokenizer) -> list[str]:
    """The family's stops, and the end-of-turn tokens that the template writes, as far as the vocabulary has them."""
    text = source.default + (source.tool_use or "")
    candidates = [*BUILTIN[kind].stop_words, *(end for end in TURN_ENDS if end in text)]
    return [word for word in dict.fromkeys(candidates) if tokenizer.added_token_id(word) is not None]


def _missing_places(source: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> str | None:
    """Which tool-related part of the conversation the template would silently drop."""
    if tools and not re.search(r"\btools\b", source):
        return "tools"
    if any(m["role"] == "system" and m.get("name") == INTERPRETER for m in messages):
        return "a code interpreter"
    if "tool_calls" not in source and any(m.get("tool_calls") for m in messages):
        return "tool_calls"
    role = next((m["role"] for m in messages if m["role"] in RESULT_ROLES), None)
    return f"messages of role {role!r}" if role and not any(word in source for word in RESULT_ROLES) else None


def _spell_results(source: str, messages: list[Message]) -> list[Message]:
    """tool, environment and ipython mean the same: use the word that the template knows."""
    known = [role for role in RESULT_ROLES if re.search(rf"['\"]{role}['\"]", source)]
    if not known:
        return messages
    return [{**m, "role": known[0]} if m["role"] in RESULT_ROLES and m["role"] not in known else m for m in messages]


def _check_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """chat_template_kwargs come from requests: they may add variables, not replace ours."""
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise RequestError(f"chat_template_kwargs must be an object, not {type(kwargs).__name__}", param="chat_template_kwargs")
    for name, value in kwargs.items():
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED or name.endswith("_token"):
            raise RequestError(f"chat_template_kwargs: {str(name)[:60]!r} is not a variable that may be set", param="chat_template_kwargs")
        if not isinstance(value, (str, int, float, bool, type(None))) or (isinstance(value, str) and len(value) > 1 << 16):
            raise RequestError(f"chat_template_kwargs.{name} must be a number, a truth value or a short text", param="chat_template_kwargs")
    return kwargs


def _builtin(name: str) -> Parts:
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(list_templates())}"
        raise ConfigError(f"chat template: there is no built-in template {name!r}; {hint}")
    return BUILTIN[name]


def _overridden(parts: Parts, config: ChatTemplateConfig) -> Parts:
    changes: dict[str, Any] = {name: value for name in PART_FIELDS if (value := getattr(config, name)) is not None}
    if "user" in changes:
        changes["first_user"] = None
    if config.meta_instruction is not None:
        changes["meta"] = config.meta_instruction
    if config.stop_words is not None:
        changes["stop_words"] = tuple(config.stop_words)
    return dataclasses.replace(parts, **changes)


def _tell_choice(folder: Path, kind: str) -> None:
    if kind == "base":
        logger.warning("%s has no chat template and is no known family: messages are joined without roles. Choose one with --chat-template", folder)
    else:
        logger.warning("%s has no chat template; the built-in one of its family, %r, is used. Choose another with --chat-template", folder, kind)
