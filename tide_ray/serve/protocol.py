"""The bodies of OpenAI's API that are understood, as strict models; the published schema comes from here.

What an engine cannot do is refused rather than ignored, except with its neutral value. Unknown fields are refused by
name. Beside OpenAI's there are vLLM's sampling fields and ``tide``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tide_ray.types import MAX_COMPLETIONS, MAX_LOGPROBS

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_PROMPTS = 1024

_Zero = Annotated[float, Field(ge=0, le=0)]
_Text = Annotated[str, Field(min_length=1)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_TokenIds = Annotated[list[_TokenId], Field(min_length=1)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Share = Annotated[float, Field(gt=0, le=1)]


class _Body(BaseModel):
    # A misspelt parameter must not be silently ignored, and "3" is not 3.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TideOptions(_Body):
    """Early exit for one request, over the engine's own settings."""

    max_disagreement: _Share | None = Field(
        default=None, description="take the exits certified for at most this share of tokens unlike full depth's"
    )
    threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="score from which tokens exit"
    )
    policy: Literal["full", "router", "confidence"] | None = Field(default=None, description="full: no early exit")
    min_depth: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="tokens exit only after at least this many layers"
    )
    stream_interval_ms: Annotated[float, Field(ge=0, le=60_000)] | None = Field(
        default=None, description="least time between two chunks; 0: a chunk for every token"
    )


class StreamOptions(_Body):
    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class _Sampling(_Body):
    model: str = Field(min_length=1, max_length=200)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: _Share | None = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = 1
    seed: _Seed | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=MAX_STOP_STRINGS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = Field(default=None, description="ignored")

    frequency_penalty: _Zero | None = Field(default=0, description="only 0")
    presence_penalty: _Zero | None = Field(default=0, description="only 0")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(default=None, description="only none")

    top_k: Annotated[int, Field(ge=-1)] | None = Field(default=0, description="as vLLM")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(default=0, description="as vLLM")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(default=1, description="as vLLM")
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(default=0, description="as vLLM")
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=256)] | None = Field(default=None, description="as vLLM")
    ignore_eos: bool | None = Field(default=False, description="as vLLM")

    tide: TideOptions | None = None


class CompletionRequest(_Sampling):
    """``POST /v1/completions``."""

    prompt: (
        str
        | _TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = Field(default=None, description="only n")
    echo: Literal[False] | None = False
    suffix: Literal[""] | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message; what an answer's own message has beside role and content may be sent back while it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(default=None, description="ignored")
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """Role and content as chat templates know them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatCompletionRequest(_Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="most tokens of an answer; without it as many as there is room for"
    )
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(default=None, description="ignored")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class TideResult(BaseModel):
    """``exit_layers`` holds the depth of every token of the choice: layers run; in a chunk of its new ones."""

    exit_layers: list[int]
    mean_exit_layer: float
    tokens: list[str] | None = Field(default=None, description="in chunks: the text that came with each token")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: CompletionLogprobs | None = None
    tide: TideResult


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: str | None = None


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: ChatLogprobs | None = None
    tide: TideResult


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    tide: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody
