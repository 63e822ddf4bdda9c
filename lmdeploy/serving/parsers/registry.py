"""The notations by name, and which one a model writes: decided by its chat template, never by its folder's name."""

from __future__ import annotations

from lmdeploy.serving.parsers.reasoning import ReasoningFormat
from lmdeploy.serving.parsers.tools import CallForm, ToolFormat
from lmdeploy.text.chat_template import ChatTemplate

_PLUGIN = CallForm("<|action_start|><|plugin|>", "<|action_end|>", gap="\n")
_CODE = CallForm("<|action_start|><|interpreter|>", "<|action_end|>", kind="code", gap="\n")
_FUNCTION = CallForm("<function=", "</function>", kind="named")
_PYTHON = CallForm("<|python_tag|>", more=True)
_BARE = CallForm("", more=True)

_INTERNLM = ToolFormat((_PLUGIN, _CODE), key="parameters", one_call=True)
_HERMES = ToolFormat((CallForm("<tool_call>", "</tool_call>", gap="\n"),))

#: --tool-call-parser
TOOL_FORMATS: dict[str, ToolFormat] = {
    "internlm": _INTERNLM,
    "intern-s1": _INTERNLM,
    "llama3": ToolFormat((_BARE, _PYTHON, _FUNCTION), key="parameters"),
    "llama3_1": ToolFormat((_FUNCTION, _PYTHON, _BARE), key="parameters"),
    "hermes": _HERMES,
    "qwen": _HERMES,
    "qwen2d5": _HERMES,
    "qwen3": _HERMES,
    "mistral": ToolFormat((CallForm("[TOOL_CALLS]", gap=" "),), in_list=True),
    "json": ToolFormat((_BARE,)),
}

_THINK = ReasoningFormat()
#: --reasoning-parser
REASONING_FORMATS: dict[str, ReasoningFormat] = {"deepseek-r1": _THINK, "qwen-qwq": _THINK, "qwen3": _THINK, "intern-s1": _THINK}

#: style of a built-in template -> notation
_BY_STYLE = {"plugin": "internlm", "function_tag": "llama3_1", "tool_call": "hermes", "tool_list": "mistral"}
#: what a checkpoint's own template says of calls -> notation; the first that it has counts
_BY_TEXT = (
    ("<|action_start|>", "internlm"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("<function=", "llama3_1"),
    ("<|python_tag|>", "llama3"),
    ("ipython", "llama3"),
)


def tool_format(name: str | None, template: ChatTemplate) -> ToolFormat | None:
    """The notation of tool calls: the named one, else the template's; None for 'none', and where there is no place for tools."""
    if name is not None:
        return TOOL_FORMATS.get(name)
    text = template.source
    if "tools" not in text:
        return TOOL_FORMATS[_BY_STYLE[template.tool_style]] if template.tool_style in _BY_STYLE else None
    return TOOL_FORMATS[next((found for mark, found in _BY_TEXT if mark in text), "json")]


def reasoning_format(name: str | None, template: ChatTemplate) -> ReasoningFormat | None:
    """The tags of reasoning: the named ones, else the template's; None for 'none', and for models that do not think."""
    if name is not None:
        return REASONING_FORMATS.get(name)
    return _THINK if template.thinks else None
