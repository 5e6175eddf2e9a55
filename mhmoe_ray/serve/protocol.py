"""Shapes of the OpenAI completions API, as far as this server goes: https://platform.openai.com/docs/api-reference.

A field that is not here is refused by name; silently ignoring, say, a penalty would give answers that nobody asked for.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _encodable(text: str) -> str:
    text.encode()  # JSON can carry half of a surrogate pair, which is no character; the error is a ValueError
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[str, Field(min_length=1), AfterValidator(_encodable)]
# One text may be given without its list.
AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class CompletionRequest(BaseModel):
    # Strict: "5" is not a number and 1 is not a boolean.
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[list[Text], AsList, Field(min_length=1, max_length=1)]
    model: str | None = None
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopText], AsList, Field(max_length=4)] = []
    stream: bool = False
    echo: bool = False
    n: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class Choice(BaseModel):
    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    prompt_tokens: int
    """With the token that starts a document."""
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The whole answer, or one chunk of a streamed one; the last chunk has `finish_reason` and `usage`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mhmoe-ray"] = "mhmoe-ray"
    max_model_len: int
    """Tokens that prompt and answer may have together."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"] = "invalid_request_error"
    param: str | None = None
    """The field of the request that is wrong."""
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class RequestError(Exception):
    """A request that cannot be answered; the client gets `status` and `detail` as its body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, param=param, code=code)
