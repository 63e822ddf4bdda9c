"""Bodies of /v1/messages and /v1/messages/count_tokens. Known fields are checked strictly; unknown ones are ignored, because clients are ahead of us."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmdeploy.serving.openai.protocol import MAX_MESSAGES, MAX_STOPS, MAX_TOKENS, Bag, Flag, Name, OpenBody, StopText, Text

MAX_BLOCKS = 1000
MAX_TOOLS = 128


class _Part(BaseModel):
    """A piece of a body: what it is checked for, and whatever else it carries (cache_control, citations)."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class ImageSource(_Part):
    """A picture: base64 data, or a URL."""

    type: Literal["base64", "url"]
    media_type: Name | None = None
    data: Text | None = None
    url: Text | None = None


class Block(_Part):
    """One content block; which fields it needs depends on `type`, and is checked in `convert`."""

    type: Name
    text: Text | None = None
    id: Name | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: Text | Annotated[list[Block], Field(max_length=MAX_BLOCKS)] | Bag | None = None
    thinking: Text | None = None
    source: ImageSource | None = None
    is_error: Flag = None


Content = Text | Annotated[list[Block], Field(max_length=MAX_BLOCKS)]


class Message(_Part):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(_Part):
    """A function that the client runs."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: Text | None = None
    input_schema: Bag | None = None
    type: Name | None = None
    strict: Flag = None


class ToolChoice(_Part):
    """Whether, and which, tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: Flag = None


class Thinking(_Part):
    """Whether the model thinks first. A budget is not enforced."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, lt=MAX_TOKENS)] | None = None


class OutputFormat(_Part):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(_Part):
    """Form and effort."""

    format: OutputFormat | None = None
    effort: Name | None = None


class CountRequest(OpenBody):
    """POST /v1/messages/count_tokens."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Content | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=MAX_TOKENS)]
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: Flag = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    ignore_eos: Flag = None
    skip_special_tokens: Flag = None
