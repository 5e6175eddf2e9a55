"""Functions that the routes share: checks of requests, tokenizing and answering."""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.answer import Answerer, ServedModel, ServedText
from mhmoe_ray.serving.api.access import AccessControl, Client
from mhmoe_ray.serving.api.errors import RequestError
from mhmoe_ray.serving.api.stream import Answers, StreamPacer, timeout_error
from mhmoe_ray.serving.engine import Request
from mhmoe_ray.spec import ServeSpec

logger = logging.getLogger("ray.serve")
COMPLETION_TOKENS = 16
"""Largest number of tokens of a completion by default, as in OpenAI's API."""


Served = TypeVar("Served", bound=ServedModel)
Text = TypeVar("Text", bound=ServedText)


@dataclass
class ModelService(Generic[Served]):
    """The served model with the server's limits and clients, and the operations that all models' routes share."""

    answerer: Served
    model: str
    spec: ServeSpec
    access: AccessControl
    start_time: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_names(self) -> list[str]:
        """Names of the model and its adapters."""
        return [self.model, *self.answerer.adapters]

    def check_model(self, model_name: str | None) -> str:
        """Return the name of the model or adapter that answers a request; RequestError if there is no such one."""
        if model_name is None:
            return self.model
        if model_name not in self.model_names:
            names = ", ".join(map(repr, self.model_names))
            message = f"there is no model {model_name!r} here; this server has {names}"
            raise RequestError(404, message, "model", "model_not_found")
        return model_name

    def adapter(self, model_name: str) -> str:
        """Return the adapter of this name, "" for the model alone."""
        return "" if model_name == self.model else model_name

    async def begin_request(self, client: Client) -> None:
        """Count one more request of a client against its rate limit.

        An exceeded limit, or a rate limiter that does not answer in time, is a RequestError.
        """
        # The wait has a timeout, because the rate limiter may be another process, which does not answer while it is
        # restarted.
        try:
            async with asyncio.timeout(self.spec.request_timeout):
                await client.begin_request()
        except TimeoutError as e:
            raise timeout_error(self.spec.request_timeout) from e


class TextService(ModelService[Text]):
    """A served decoder or encoder, and the operations that its routes share."""

    async def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, with a start token if the model was trained with one."""
        # A thread encodes the prompt, because a long prompt takes seconds and streams must go on meanwhile.
        return await asyncio.to_thread(self.answerer.encode, prompt)

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        # A thread decodes the tokens, because a long text takes a while and streams must go on meanwhile.
        return await asyncio.to_thread(self.answerer.decode, tokens)

    def log_prompts(self, client: Client, prompts: Iterable[Sequence[int]]) -> None:
        """Log the client's name and the texts of its request if the spec sets `serve.log_prompts`."""
        if self.spec.log_prompts:
            for token_ids in prompts:
                logger.info("%s asks: %r", client.name or "somebody", self.answerer.decode(token_ids))

    def check_max_tokens(self, max_tokens: int, param: str) -> None:
        """Raise RequestError about the field `param` if a request asks for more tokens than the server allows."""
        if max_tokens > self.spec.max_tokens:
            message = f"{param} is {max_tokens}, and this server allows at most {self.spec.max_tokens}"
            raise RequestError(400, message, param)

    def chat_max_tokens(self, max_completion_tokens: int | None, max_tokens: int | None) -> int:
        """Return the largest number of tokens of a chat answer, checked as in `check_max_tokens`.

        `max_completion_tokens` takes precedence; the server's limit is the default.
        """
        limit = max_completion_tokens or max_tokens or self.spec.max_tokens
        self.check_max_tokens(limit, "max_completion_tokens" if max_completion_tokens else "max_tokens")
        return limit


@dataclass
class CompletionService(TextService[Answerer]):
    """A served decoder, and the operations that the routes of completions share."""

    def __post_init__(self) -> None:
        # All requests share one pacer, because its interval depends on the number of all streams of the replica.
        self.pacer = StreamPacer(self.spec.stream_interval)

    def completion_max_tokens(self, max_tokens: int | None) -> int:
        """Return the largest number of tokens of a completion, checked as in `check_max_tokens`.

        The default never exceeds the server's limit.
        """
        if max_tokens is None:
            return min(COMPLETION_TOKENS, self.spec.max_tokens)
        self.check_max_tokens(max_tokens, "max_tokens")
        return max_tokens

    async def prompt_ids(self, prompt: str | Sequence[int], has_answer: bool, param: str) -> tuple[int, ...]:
        """Return the token ids of a prompt; an unknown token or a prompt that is too long is a RequestError.

        If `has_answer`, the answer's first token must fit in the context too.
        """
        token_ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        self._check_tokens(token_ids, param)
        try:
            self.answerer.check_length(token_ids, has_answer)
        except ServeError as e:
            raise RequestError(400, str(e), param, "context_length_exceeded") from e
        return tuple(token_ids)

    def _check_tokens(self, token_ids: Iterable[int], param: str) -> None:
        """Raise RequestError about the field `param` if a token id is not in the tokenizer."""
        tokenizer_size = self.answerer.tokenizer_size
        if unknown_token := next((token for token in token_ids if token >= tokenizer_size), None):
            raise RequestError(400, f"{param!r}: there is no token {unknown_token}; there are {tokenizer_size}", param)

    async def start_answers(
        self,
        engine_requests: Sequence[tuple[Request, int]],
        echo: bool,
        prompt_tokens: int,
        client: Client,
    ) -> Answers:
        """Start the answers to one request of a client; all choices together count as one request.

        Each engine request is one choice, with the number of tokens that the server added to its prompt. Unknown
        tokens, more choices than the server holds at a time, or the errors of `begin_request` are a RequestError.
        """
        sampling_params = engine_requests[0][0].sampling_params
        self._check_tokens(sampling_params.logit_bias, "logit_bias")
        if sampling_params.min_tokens > sampling_params.max_tokens:
            message = f"min_tokens is {sampling_params.min_tokens}, more than max_tokens, {sampling_params.max_tokens}"
            raise RequestError(400, message, "min_tokens")
        if len(engine_requests) > (max_choices := self.spec.max_concurrency + self.spec.max_waiting):
            message = f"{len(engine_requests)} choices are more than the {max_choices} that this server takes at a time"
            raise RequestError(400, message, "n")
        if engine_requests[0][0].return_routes and not self.answerer.engine.returns_routes:
            message = f"'return_routes': the engine {self.spec.engine} or a model without experts has no routes"
            raise RequestError(400, message, "return_routes", "unsupported_parameter")
        await self.begin_request(client)
        prompts = (engine_request.prompt_ids[added_tokens:] for engine_request, added_tokens in engine_requests)
        self.log_prompts(client, prompts)
        answers = [
            self.answerer.answer(engine_request, echo, added_tokens) for engine_request, added_tokens in engine_requests
        ]
        adapter = engine_requests[0][0].adapter
        weights = self.answerer.adapters[adapter] if adapter else self.answerer.details.weights
        return Answers(answers, prompt_tokens, client, self.spec.request_timeout, self.pacer, weights)
