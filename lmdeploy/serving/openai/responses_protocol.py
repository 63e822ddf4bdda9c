"""Body of /v1/responses. Known fields are checked strictly; unknown ones are ignored, because clients are ahead of us."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmdeploy.serving.openai.protocol import MAX_MESSAGES, MAX_TOKENS, Bag, ContentPart, Flag, Name, OpenBody, Stop, Text

Parts = Annotated[list[ContentPart], Field(max_length=1000)]


class _Piece(BaseModel):
    """A piece of a body: what it is checked for, and whatever else it carries."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Item(_Piece):
    """A turn, a call, a call's result or a thought; which fields it needs depends on `type`, and is checked in `responses_convert`."""

    type: Name = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | Parts | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: Text | Parts | None = None
    summary: Parts | None = None


class FunctionTool(_Piece):
    """A function that the client runs; other types of tools run on OpenAI's servers."""

    type: Name
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    description: Text | None = None
    parameters: Bag | None = None
    strict: Flag = None


class TextFormat(_Piece):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextConfig(_Piece):
    """How the text must be."""

    format: TextFormat | None = None
    verbosity: Name | None = None


class Reasoning(_Piece):
    """How hard the model thinks."""

    effort: Name | None = None


class ResponsesRequest(OpenBody):
    """POST /v1/responses."""

    model: Name
    input: Text | Annotated[list[Item], Field(max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Stop = None
    ignore_eos: Flag = None
    skip_special_tokens: Flag = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Name | Bag | None = None
    parallel_tool_calls: Flag = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Name], Field(max_length=32)] | None = None
    stream: Flag = False
    metadata: Bag | None = None
    store: Flag = None
    truncation: Literal["auto", "disabled"] | None = None
    moderation: Any = None
    background: Flag = None
    context_management: Any = None
    conversation: Any = None
    previous_response_id: Any = None
    prompt: Any = None
