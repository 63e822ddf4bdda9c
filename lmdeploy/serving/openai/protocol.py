"""The wire, exactly: request bodies of every route, each field bounded, unknown fields refused.

Bodies are checked by pydantic from bytes (strict: a text is not a number). Bounds of sampling values that GenerationConfig checks
too are repeated here, because here they carry the wire's own field names. Response bodies are plain dicts made in `convert`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmdeploy.grammar import MAX_CHOICES

MAX_TEXT = 16 << 20  # characters; the body limit is stricter
MAX_NAME = 1024
MAX_MESSAGES = 10_000
MAX_STOPS = 64
MAX_PROMPTS = 128
MAX_INPUTS = 2048
MAX_IDS = 1 << 20
MAX_TOKENS = 1 << 31

Name = Annotated[str, Field(max_length=MAX_NAME)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS)]
TokenCount = Annotated[int, Field(ge=1, lt=MAX_TOKENS)]
Flag = bool | None
Bag = Annotated[dict[str, Any], Field(max_length=64)]

Role = Literal["system", "developer", "user", "assistant", "tool", "function", "environment", "ipython"]


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class OpenBody(Body):
    """A body of a protocol whose clients are ahead of us: unknown top-level fields are logged and ignored."""

    model_config = ConfigDict(extra="allow")


class ImageUrl(BaseModel):
    """Where a picture is: a data: URL, http(s), or a path below the server's media folder. `detail` is accepted and has no effect."""

    model_config = ConfigDict(extra="allow", strict=True)
    url: Text
    detail: Name | None = None


class ContentPart(BaseModel):
    """One part of a message: a text, or a picture for a model that sees; others are refused with a reason in `convert`."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Name
    text: Text | None = None
    image_url: Text | ImageUrl | None = None


class ChatMessage(Body):
    """One turn. The fields that answers carry are accepted, so that clients may send an answer's message back."""

    role: Role
    content: Text | Annotated[list[ContentPart], Field(max_length=1000)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Bag], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    function_call: Bag | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    annotations: Annotated[list[Bag], Field(max_length=1000)] | None = None
    audio: Bag | None = None


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: Flag = False
    include_obfuscation: Flag = None
    continuous_usage_stats: Flag = None


class Guided(Body):
    """The form of the answer: OpenAI's field, and the same as other servers spell it."""

    response_format: Bag | None = None
    guided_json: Bag | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(max_length=MAX_CHOICES)] | None = None
    guided_grammar: Text | None = None


class Sampling(Guided):
    """The sampling fields that chat and completions share; null = the model's or the library's default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop: Stop = None
    ignore_eos: Flag = False
    skip_special_tokens: Flag = True
    spaces_between_special_tokens: Flag = True
    include_stop_str_in_output: Flag = False
    session_id: Annotated[int, Field(ge=-1, lt=1 << 63)] | None = -1


class OpenAISampling(Sampling):
    """Fields of OpenAI's own that chat and completions share."""

    model: Name
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    min_new_tokens: Annotated[int, Field(ge=0, lt=MAX_TOKENS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    bad_words: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[Annotated[str, Field(max_length=20)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=4096)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    user: Name | None = None
    metadata: Bag | None = None
    store: Flag = None
    service_tier: Name | None = None
    adapter_name: Name | None = None


class ChatRequest(OpenAISampling):
    """POST /v1/chat/completions."""

    messages: Text | Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)]
    input_ids: TokenIds | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Bag], Field(max_length=128)] | None = None
    tool_choice: Name | Bag | None = None
    functions: Annotated[list[Bag], Field(max_length=128)] | None = None
    function_call: Name | Bag | None = None
    parallel_tool_calls: Flag = None
    reasoning_effort: Name | None = None
    do_preprocess: Flag = True
    chat_template_kwargs: Bag | None = None
    enable_thinking: Flag = None
    return_token_ids: Flag = False
    modalities: Annotated[list[Name], Field(max_length=8)] | None = None
    prediction: Bag | None = None
    audio: Bag | None = None
    web_search_options: Bag | None = None
    verbosity: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None
    prompt_cache_options: Bag | None = None
    moderation: Bag | None = None
    safety_identifier: Name | None = None


class CompletionRequest(OpenAISampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    suffix: Text | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=MAX_TOKENS)] | None = None  # 0 with echo: the prompt's log-probabilities alone
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Flag = False
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    return_token_ids: Flag = False


class GenerateRequest(Sampling):
    """POST /generate: ids or text in, ids and text out."""

    prompt: Text | None = None
    input_ids: TokenIds | None = None
    max_tokens: TokenCount | None = 128
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    return_logprob: Flag = False
    stream: Flag = False
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None


class EncodeRequest(Body):
    """POST /v1/encode."""

    input: Text | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
    do_preprocess: Flag = False
    add_bos: Flag = True


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: Name
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    pooling: Literal["mean", "last"] | None = "mean"
    user: Name | None = None


class PoolingRequest(EmbeddingRequest):
    """POST /pooling."""


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: Flag = True
    add_generation_prompt: Flag = True
    tools: Annotated[list[Bag], Field(max_length=128)] | None = None
    chat_template_kwargs: Bag | None = None
    return_token_strs: Flag = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS)]
    skip_special_tokens: Flag = False


class PerplexityRequest(Body):
    """POST /get_ppl."""

    model: Name | None = None
    input: Text | TokenIds


class InteractiveRequest(Body):
    """POST /v1/chat/interactive: a conversation whose history the server keeps."""

    prompt: Text | Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)]
    image_url: Any = None
    session_id: Annotated[int, Field(ge=-1, lt=1 << 63)] | None = -1
    interactive_mode: Flag = False
    stream: Flag = False
    stop: Stop = None
    request_output_len: Annotated[int, Field(ge=0, lt=MAX_TOKENS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = 40
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.8
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = 1.0
    ignore_eos: Flag = False
    skip_special_tokens: Flag = True
    cancel: Flag = False
    adapter_name: Name | None = None
