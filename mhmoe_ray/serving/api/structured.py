"""Tools and structured answers of conversations, for engines with `structures`: requests, checks and messages."""

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.api.errors import RequestError
from mhmoe_ray.serving.api.schema import CallMessage, ChatMessage, ChatRequest, FunctionCall, StrictRequest, ToolCall
from mhmoe_ray.serving.engine import Structure, Structures
from mhmoe_ray.serving.sampling import Text

MAX_TOOLS = 128
"""Largest number of tools of a request, as in OpenAI's API."""


class Function(StrictRequest):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of the arguments."""
    strict: bool | None = None


class Tool(StrictRequest):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(StrictRequest):
    """The name of one of the request's functions."""

    name: str


class ToolChoice(StrictRequest):
    """The tool that the answer must call."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(StrictRequest):
    """The JSON schema that `response_format` asks for; only `schema` has an effect."""

    name: str
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(StrictRequest):
    """The format of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CalledFunction(StrictRequest):
    """An earlier call's function and its arguments as JSON."""

    name: Text
    arguments: Text


class EarlierCall(StrictRequest):
    """A call of a tool in an earlier message of the assistant."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int | None, Field(exclude=True)] = None
    """Place of the call in a stream, which some clients send back; it has no effect."""


class ToolMessage(ChatMessage):
    """A chat message of a request, which may call tools or have the result of a call."""

    tool_calls: list[EarlierCall] | None = None
    tool_call_id: Text | None = None


class StructuredChatRequest(ChatRequest):
    """A request for the next chat message, which may call tools or have a given form."""

    # Fields with "type: ignore" allow more than those of the base class.

    messages: Annotated[list[ToolMessage], Field(min_length=1)]  # type: ignore[assignment]
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"  # type: ignore[assignment]
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")  # type: ignore[assignment]
    structured_outputs: dict[Literal["json", "regex", "choice", "grammar"], Any] = Field(
        default_factory=dict, min_length=1, max_length=1
    )
    """The form of the answer as in vLLM's API."""


class AnswerPlan(NamedTuple):
    """Plan for the form of a request's answers, and for how they are read."""

    tools: Sequence[dict[str, Any]] = ()
    """Tools for the chat template."""
    structure: Structure | None = None
    read: Callable[[str], CallMessage | None] | None = None
    """Function that returns the message of an answer with calls, and None for an answer without any."""


def template_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the messages of a request as chat templates take them, with arguments of calls as objects."""
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    for message in messages:
        for call in message.get("tool_calls", ()):
            try:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            except ValueError as e:
                raise RequestError(400, f"'messages': arguments of a call are not JSON: {e}", "messages") from e
    return messages


async def plan_answer(request: StructuredChatRequest, structures: Structures) -> AnswerPlan:
    """Return how the answers to a request are formed and read; what the engine cannot do is a RequestError."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    choice = request.tool_choice if tools else "none"
    if not tools and (request.tool_choice == "required" or isinstance(request.tool_choice, ToolChoice)):
        raise RequestError(400, "'tool_choice' needs 'tools'", "tool_choice")
    structure, param = _requested_structure(request), "structured_outputs" if request.structured_outputs else ""
    read = None
    if choice == "none":
        tools = []
    elif choice == "auto":
        if not structures.has_tool_parser:
            message = "the server has no parser of tool calls; set serve.vllm.tool_call_parser, or use another choice"
            raise RequestError(400, f"'tool_choice': {message}", "tool_choice", "unsupported_parameter")

        def read(text: str) -> CallMessage | None:
            content, calls = structures.parse_calls(text, tools)
            return _call_message(content, calls if request.parallel_tool_calls else calls[:1])
    else:
        name = choice.function.name if isinstance(choice, ToolChoice) else None
        if name is not None and name not in (tool.function.name for tool in request.tools):
            raise RequestError(400, f"'tool_choice': there is no tool {name!r} in 'tools'", "tool_choice")
        structure = Structure("json", structures.call_schema(tools, name, request.parallel_tool_calls))
        param = "tools"

        def read(text: str) -> CallMessage | None:
            return _call_message("", _required_calls(text, name))

    if structure:
        await _check_structure(request, structures, structure, param or "response_format")
    return AnswerPlan(tools, structure, read)


def _requested_structure(request: StructuredChatRequest) -> Structure | None:
    if request.structured_outputs:
        [(kind, value)] = request.structured_outputs.items()
        return Structure(kind, value)
    response_format = request.response_format
    if response_format.type == "json_object":
        return Structure("json_object", True)
    if response_format.type == "text":
        return None
    if response_format.json_schema is None:
        raise RequestError(400, "'response_format': json_schema is missing", "response_format")
    return Structure("json", response_format.json_schema.schema_)


async def _check_structure(
    request: StructuredChatRequest, structures: Structures, structure: Structure, param: str
) -> None:
    # A complete structured answer can only end, so nothing may forbid its end.
    for name in ("ignore_eos", "min_tokens"):
        if getattr(request, name):
            raise RequestError(400, f"{name!r} contradicts {param!r}, which decides where an answer ends", name)
    # A thread checks the structure, because a large one takes seconds and streams must go on meanwhile.
    try:
        await asyncio.to_thread(structures.check, structure)
    except ServeError as e:
        raise RequestError(400, f"{param!r}: {e}", param) from e


def _required_calls(text: str, name: str | None) -> list[tuple[str, str]]:
    """Return the calls in an answer whose form is that of `Structures.call_schema`; none if the answer is cut."""
    try:
        value = json.loads(text)
    except ValueError:
        return []
    if name is not None:
        return [(name, text)]
    return [(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in value]


def _call_message(content: str, calls: list[tuple[str, str]]) -> CallMessage | None:
    tool_calls = [
        ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=FunctionCall(name=name, arguments=arguments))
        for name, arguments in calls
    ]
    return CallMessage(role="assistant", content=content or None, tool_calls=tool_calls) if tool_calls else None
