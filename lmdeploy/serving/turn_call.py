"""`TurnCall`: what any protocol asks of a turn. Apart from turns.py, so that what converts the wire need not know the service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmdeploy.config import GenerationConfig


@dataclass(frozen=True, slots=True)
class TurnCall:
    """A checked request in a form that belongs to no protocol."""

    messages: list[dict[str, Any]] | str | list[int]  # OpenAI-shaped dicts (content is text), raw text, or token ids
    gen: GenerationConfig
    templated: bool = True
    tools: list[dict[str, Any]] | None = None  # OpenAI's shape {"type": "function", "function": {...}}, or {"type": "code_interpreter"}
    tool_choice: str = "auto"  # 'none', 'auto', 'required', or 'function:NAME'
    parallel_tool_calls: bool = True
    template_kwargs: dict[str, Any] | None = None  # enable_thinking and other variables of the checkpoint's template
