"""Structured answers and tool calls through vLLM: its checks of schemas, its schemas of calls and its parsers."""

import json
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams as VllmSamplingParams
from vllm.config import VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
    ChatCompletionToolsParam,
)
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.utils import get_json_schema_from_tools

from mhmoe_ray.data.tokenizer import token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.detokenizer import TextDecoder, TokenBytes
from mhmoe_ray.serving.engine.request import Structure

MAX_CHARACTERS = 1 << 16
"""Largest size of a structure: the time to compile it grows with the size."""


class VllmStructures:
    """The structures of answers that vLLM enforces, for `serving/api`."""

    def __init__(self, config: VllmConfig, tokenizer: Any, parser: str | None) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._parser_class = ToolParserManager.get_tool_parser(parser) if parser else None
        backend = tokenizer.backend_tokenizer
        token_bytes = TokenBytes(backend, TextDecoder(backend))
        # JSON allows no control characters in strings. Xgrammar 0.2 lets them into strings with a maxLength. Line
        # breaks, which it forbids there, stay allowed between values.
        self.json_biases = {
            token: float("-inf")
            for token in range(token_count(backend))
            if any(byte < ord(" ") and byte not in b"\r\n" for byte in token_bytes[token])
        }

    @property
    def has_tool_parser(self) -> bool:
        """True if a parser finds calls in answers that need not be calls (`serve.vllm.tool_call_parser`)."""
        return self._parser_class is not None

    def check(self, structure: Structure) -> None:
        """Raise ServeError for a structure that is too large or that vLLM's grammars cannot express."""
        fix = "send another one"
        if (size := len(json.dumps(structure.value))) > MAX_CHARACTERS:
            raise ServeError(structure.kind, f"it has {size:,} characters, and at most {MAX_CHARACTERS:,} fit", fix)
        try:
            VllmSamplingParams(structured_outputs=structured_params(structure)).verify(
                self._config.model_config, None, self._config.structured_outputs_config, self._tokenizer
            )
        # The libraries of grammars raise various exceptions, all about the structure.
        except Exception as e:
            raise ServeError(structure.kind, str(e), fix) from e

    def call_schema(self, tools: Sequence[dict[str, Any]], name: str | None, is_parallel: bool) -> Any:
        """Return the JSON schema of the arguments of a named tool, or of a list of calls of any tools."""
        named_choice = {"type": "function", "function": {"name": name}}
        choice = "required" if name is None else ChatCompletionNamedToolChoiceParam.model_validate(named_choice)
        vllm_tools = [ChatCompletionToolsParam.model_validate(tool) for tool in tools]
        return get_json_schema_from_tools(choice, vllm_tools, is_parallel)

    def parse_calls(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
        """Return the text before the calls of an answer, and each call's name and arguments."""
        assert self._parser_class is not None
        request = ChatCompletionRequest(messages=[{"role": "user", "content": ""}], tools=list(tools))
        result = self._parser_class(self._tokenizer, request.tools).extract_tool_calls(text, request)
        calls = [(call.function.name, call.function.arguments) for call in result.tool_calls]
        return result.content or "", calls


def structured_params(structure: Structure) -> StructuredOutputsParams:
    """Return vLLM's parameters of a structure."""
    return StructuredOutputsParams(**{structure.kind: structure.value})
