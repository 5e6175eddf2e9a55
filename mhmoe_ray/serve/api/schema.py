"""Schemas of OpenAI's API, as far as this server supports it: https://platform.openai.com/docs/api-reference.

A field that is not defined here is refused by name: silently ignoring a suffix, for example, would give answers that
nobody asked for.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mhmoe_ray.serve.answer import ModelDetails
from mhmoe_ray.serve.engine import Sampling

MOST_CHOICES = 128
"""Largest number of choices of one request: prompts times n."""
MOST_LOGPROBS = 20


def _encodable(text: str) -> str:
    text.encode()  # JSON can carry half of a surrogate pair, which is no character; the error is a ValueError
    return text


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _nullable(schema: dict[str, Any]) -> None:
    """Allow null for each optional field in the API's description, as `_null_is_absent` does for requests."""
    required = schema.get("required", [])
    for name, of in schema["properties"].items():
        if name not in required:
            of["anyOf"] = [{key: of.pop(key) for key in [*of] if key not in ("title", "default")}, {"type": "null"}]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """Wrap a single text, or a single list of token ids, into a list."""
    alone = isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, int) for v in value))
    return [value] if alone else value


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[str, Field(min_length=1), AfterValidator(_encodable)]
# To JSON, 1.0 is a whole number too.
WHOLE = BeforeValidator(lambda value: int(value) if _is_whole(value) else value)
Token = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Row = Annotated[list[Token], Field(min_length=1)]
Stops = Annotated[list[StopText], Field(max_length=4)]
Prompts = Annotated[list[Text | Row], Field(min_length=1, max_length=MOST_CHOICES)]


class Strict(BaseModel):
    """A request in which "5" is not a number, 1 is not a boolean, and null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class StreamOptions(Strict):
    include_usage: bool = False
    """Whether a last chunk without choices reports the usage."""


class Choosing(Strict):
    """The fields that both kinds of completions have in common."""

    model: str | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: Annotated[int, Field(ge=0, lt=2**31), WHOLE] = 0
    """Number of most likely tokens to choose from; 0 means all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] = 1
    stop: Annotated[Stops, BeforeValidator(_as_list, StopText | Stops)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Identifier of the client's own; it is accepted and ignored."""

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Choosing":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options are for stream: true")
        return self

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, choice: int) -> Sampling:
        """Return the sampling parameters of choice number `choice`.

        Each choice has a seed of its own; choice 0 uses the request's seed.
        """
        return Sampling(
            max_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.presence_penalty,
            self.frequency_penalty,
            {int(token): bias for token, bias in self.logit_bias.items()},
            # Far from the seeds that other requests are likely to have.
            None if self.seed is None else self.seed + choice * 0x9E3779B97F4A7C15,
        )


class CompletionRequest(Choosing):
    prompt: Annotated[Prompts, BeforeValidator(_as_prompts, Text | Row | Prompts)]
    """Texts, or lists of token ids; no token is put in front of token ids."""
    max_tokens: Annotated[int, Field(ge=0), WHOLE] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    echo: bool = False


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    prompt_tokens: int
    """Number of tokens of the prompts, including the token that starts a document."""
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A complete answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Part(Strict):
    type: Literal["text"]
    text: Text


def _joined(content: Any) -> Any:
    """Return the text of a message's parts joined; other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text), **more} if not more:
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                raise ValueError(f"a part of type {kind!r} is not supported; send text")
            case _:
                raise ValueError('a part is {"type": "text", "text": TEXT}')
    return "".join(texts)


class Message(Strict):
    role: Text
    content: Annotated[Text, BeforeValidator(_joined, Text | list[Part])] | None = None
    """Text of the message; null is allowed for an assistant's turn and means an empty text."""
    name: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None:
            if self.role != "assistant":
                raise ValueError("content is required, but of an assistant")
            self.content = ""
        return self


class ChatRequest(Choosing):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    """The newer name of `max_tokens`. Without either, the server's limit applies."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] = 0


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]


class Said(BaseModel):
    """A message, or a part of one in a stream."""

    role: Literal["assistant"] | None = None
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatDelta(BaseModel):
    index: int
    delta: Said
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mhmoe-ray"] = "mhmoe-ray"
    max_model_len: int
    """Largest number of tokens of prompt and answer together."""
    details: ModelDetails


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeRequest(Strict):
    prompt: Text
    model: str | None = None
    add_special_tokens: bool = True
    """Whether the token that starts a document comes first, as before the prompt of a completion."""


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class TokenizerInfo(BaseModel):
    tokenizer_class: Literal["PreTrainedTokenizerFast"] = "PreTrainedTokenizerFast"
    bos_token: str
    eos_token: str
    chat_template: str | None


class DetokenizeRequest(Strict):
    tokens: list[Token]
    model: str | None = None


class Detokenized(BaseModel):
    prompt: str


class AllStats(BaseModel):
    model: str
    replicas: list[dict[str, Any]]
    """Statistics of each replica's engine (`serve/engine/request.py`)."""


ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ErrorDetail(BaseModel):
    message: str
    type: ErrorType = "invalid_request_error"
    param: str | None = None
    """Name of the field of the request that is wrong."""
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail
