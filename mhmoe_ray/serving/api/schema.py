"""Schemas of requests and responses: prompts, sampling parameters, chat messages, choices, statistics and errors.

The schemas follow OpenAI's API as far as this server supports it (https://platform.openai.com/docs/api-reference). A
conversation is a list of chat messages. A request with an undefined field is refused: ignoring OpenAI's `suffix`, for
example, would give another answer than the client requested.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mhmoe_ray.serving.answer import ModelDetails, ScoredText
from mhmoe_ray.serving.detokenizer import format_token
from mhmoe_ray.serving.engine import TokenRoutes
from mhmoe_ray.serving.sampling import (
    PLAIN_NUMBER,
    Bias,
    CommonSampling,
    LogprobCount,
    Number,
    PositiveNumber,
    SamplingParams,
    StopText,
    Text,
    WholeNumber,
    sampling_field,
    wrap_text,
)
from mhmoe_ray.serving.sampling_fields import MAX_TEMPERATURE

MAX_CHOICES = 128
"""Largest number of choices (answers) of one request: the number of prompts times `n`."""


def _allow_null(schema: dict[str, Any]) -> None:
    """Allow null for each optional field of a schema in the API's description, because `_drop_nulls` accepts it."""
    required = schema.get("required", [])
    for name, field_schema in schema["properties"].items():
        if name not in required:
            types = [key for key in field_schema if key not in ("title", "default", "description")]
            field_schema["anyOf"] = [{key: field_schema.pop(key) for key in types}, {"type": "null"}]


def _wrap_prompt(value: Any) -> Any:
    """Return a single text, or a single list of token ids, as a list of one; any other value is returned unchanged."""
    is_single = isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, int) for v in value))
    return [value] if is_single else value


TokenId = Annotated[int, Field(ge=0, lt=2**31), PLAIN_NUMBER]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
StopTexts = Annotated[list[StopText], Field(max_length=4)]
Prompts = Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]


class StrictRequest(BaseModel):
    """A request that is validated strictly: "5" is not a number, 1 is not a boolean, and null means absent.

    A field that is not defined is an error.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_allow_null, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class StreamOptions(StrictRequest):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Whether a last chunk without choices reports the numbers of tokens."""


class NeutralFields(StrictRequest):
    """Fields of OpenAI's API that change nothing here; a value with which they would is refused as unsupported."""

    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False
    response_format: Annotated[dict[Literal["type"], Literal["text"]], Field(min_length=1)] = {"type": "text"}
    modalities: list[Literal["text"]] = ["text"]
    best_of: Literal[1] = 1
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    metadata: dict[str, Any] = {}
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class SamplingRequest(NeutralFields, CommonSampling):
    """The fields that requests for completions and for chat completions share, with the limits of OpenAI's API."""

    model: str | None = None
    temperature: Number = sampling_field("temperature", le=MAX_TEMPERATURE)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), PLAIN_NUMBER] | None = sampling_field("seed")
    stop: Annotated[StopTexts, BeforeValidator(wrap_text, StopText | StopTexts)] = sampling_field("stop")
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] = sampling_field("logit_bias")
    n: WholeNumber = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_routes: bool = False
    """Whether each choice has the token ids of prompt and answer with the experts that they chose."""

    def sampling_params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """Return the parameters of choice 0 of a prompt; further choices get theirs by `SamplingParams.for_answer`."""
        # The fields are valid already, and completions may have 0 as `max_tokens`.
        return SamplingParams.model_construct(
            **{name: getattr(self, name) for name in CommonSampling.model_fields},
            max_tokens=max_tokens,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            logprobs=logprobs,
        )


class CompletionRequest(SamplingRequest):
    """A request for completions of prompts."""

    prompt: Annotated[Prompts, BeforeValidator(_wrap_prompt, Text | TokenIds | Prompts)]
    """Texts, or lists of token ids; the server puts no token in front of token ids."""
    max_tokens: Annotated[int, Field(ge=0), PLAIN_NUMBER] | None = None
    """Largest number of tokens of an answer; by default 16, as in OpenAI's API, or the server's limit if it is less."""
    logprobs: LogprobCount | None = None
    echo: bool = False


class Logprobs(BaseModel):
    """Log-probabilities of the tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Routes(BaseModel):
    """Token ids of a prompt and its answer, without the answer's last token, and the experts of each token."""

    token_ids: list[int]
    experts: list[list[list[int]]]
    """By token and layer with experts: those of all sub-tokens one after another, each sub-token's by preference."""

    @classmethod
    def from_tokens(cls, routes: Sequence[TokenRoutes]) -> "Routes | None":
        """Return the routes of tokens; None without any."""
        return cls(token_ids=[r.token for r in routes], experts=[r.experts for r in routes]) if routes else None


OptionalRoutes = Annotated[Routes | None, Field(exclude_if=lambda routes: routes is None)]
"""Routes of a choice; without them, the field is left out as in OpenAI's responses."""


class Choice(BaseModel):
    """One answer of a completion, or a piece of it in a stream."""

    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    routes: OptionalRoutes = None


class Usage(BaseModel):
    """Numbers of tokens of a request."""

    prompt_tokens: int
    """Number of tokens of the prompts, including the token that starts a document."""
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A complete response to a request for completions, or one chunk of a streamed response."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Time of the response in seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class TextPart(StrictRequest):
    """A part of a chat message's text."""

    type: Literal["text"]
    text: Text


def _join_text_parts(content: Any) -> Any:
    """Return the joined text of a chat message's parts; content that is not a list of parts is returned unchanged."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text), **other_fields} if not other_fields:
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                raise ValueError(f"a part of type {kind!r} is not supported; send text")
            case _:
                raise ValueError('a part is {"type": "text", "text": TEXT}')
    return "".join(texts)


class ChatMessage(StrictRequest):
    """A chat message of a request."""

    role: Text
    content: Annotated[Text, BeforeValidator(_join_text_parts, Text | list[TextPart])] | None = None
    """Text of the chat message; null is allowed for an assistant's message and means an empty text."""
    name: Text | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "ChatMessage":
        """Replace the missing content of an assistant's message by an empty text; raise ValueError for other roles."""
        if self.content is None:
            if self.role != "assistant":
                raise ValueError("content is required, except in a message of the assistant")
            self.content = ""
        return self


_CONVERSATION = TypeAdapter(Annotated[list[ChatMessage], Field(min_length=1)])


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """Check chat messages as those of a request, and return them in the form that chat templates take.

    Malformed messages are a ValueError, which names the first wrong field.
    """
    try:
        conversation = _CONVERSATION.validate_python(messages)
    except ValidationError as e:
        first_error = e.errors()[0]
        path = ".".join(map(str, ("messages", *first_error["loc"])))
        raise ValueError(f"{path}: {first_error['msg']}") from e
    return [message.model_dump(exclude_none=True) for message in conversation]


class ChatRequest(SamplingRequest):
    """A request for the next chat message of a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: PositiveNumber | None = None
    max_completion_tokens: PositiveNumber | None = None
    """The newer name of `max_tokens`. If a request has neither field, the server's limit applies."""
    logprobs: bool = False
    top_logprobs: LogprobCount = 0


class TokenLogprob(BaseModel):
    """Log-probability of a token in a chat completion."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """Log-probability of an answer's token, with the most likely tokens in its place."""

    top_logprobs: list[TokenLogprob]

    @classmethod
    def from_score(cls, score: ScoredText) -> "ChosenLogprob":
        """Return the log-probability of an answer's token from its score."""
        assert score.logprob is not None
        alternatives = [TokenLogprob(**_token_fields(*alternative)) for alternative in score.alternatives]
        return cls(**_token_fields(score.token_bytes, score.logprob), top_logprobs=alternatives)


def _token_fields(token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {"token": format_token(token_bytes), "logprob": logprob, "bytes": list(token_bytes)}


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of a chat message."""

    content: list[ChosenLogprob]


class ChatResponseMessage(BaseModel):
    """A chat message of the assistant, or a piece of it in a stream."""

    role: Literal["assistant"] | None = None
    content: str


class FunctionCall(BaseModel):
    """Name of a called function, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """Call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class IndexedToolCall(ToolCall):
    """Call of a tool in a chunk of a stream, with its place among the calls of the answer."""

    index: int


class CallMessage(BaseModel):
    """A chat message of the assistant that calls tools."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall]


class CallDelta(BaseModel):
    """The content of a chunk with all tool calls of an answer."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[IndexedToolCall]

    @classmethod
    def from_message(cls, message: CallMessage) -> "CallDelta":
        calls = [IndexedToolCall(index=i, **dict(call)) for i, call in enumerate(message.tool_calls)]
        return cls(role=message.role, content=message.content, tool_calls=calls)


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One answer of a chat completion."""

    index: int
    message: CallMessage | ChatResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    routes: OptionalRoutes = None


class ChatDelta(BaseModel):
    """A piece of one answer of a streamed chat completion."""

    index: int
    delta: CallDelta | ChatResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    routes: OptionalRoutes = None


class ChatCompletion(BaseModel):
    """A complete response to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(BaseModel):
    """A chunk of a streamed response to a conversation."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class Model(BaseModel):
    """Description of the model that this server serves, or of an adapter of it."""

    id: str
    parent: str | None
    """Name of the model that an adapter adapts; None for the model itself."""
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mhmoe-ray"] = "mhmoe-ray"
    max_model_len: int | None
    """Largest number of tokens of prompt and answer together; None for a vision model."""
    details: ModelDetails


class ModelList(BaseModel):
    """List of the models that this server serves."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeRequest(StrictRequest):
    """A request for the token ids of a text."""

    prompt: Text
    model: str | None = None
    add_special_tokens: bool = True
    """Whether the token that starts a document comes first, as before the prompt of a completion."""


class TokenizeResponse(BaseModel):
    """The token ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class TokenizerInfo(BaseModel):
    """Tokens that start and end a document, and the chat template."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    bos_token: str
    eos_token: str
    chat_template: str | None


class DetokenizeRequest(StrictRequest):
    """A request for the text of token ids."""

    tokens: list[TokenId]
    model: str | None = None


class DetokenizeResponse(BaseModel):
    """The text of token ids."""

    prompt: str


class StatsResponse(BaseModel):
    """Statistics of the engines of all replicas."""

    model: str
    replicas: list[dict[str, Any]]
    """Statistics of each replica's engine (`serving/engine/request.py`)."""


ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ErrorDetail(BaseModel):
    """Description of an error in the format of OpenAI's API."""

    message: str
    type: ErrorType = "invalid_request_error"
    param: str | None = None
    """Name of the request's field that is wrong; None if no field is."""
    code: str | None = None


class ErrorBody(BaseModel):
    """Body of an error response."""

    error: ErrorDetail
