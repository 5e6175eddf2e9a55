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
from mhmoe_ray.serving.api.schema import SamplingRequest
from mhmoe_ray.serving.api.stream import Answers, StreamPacer, timeout_error
from mhmoe_ray.serving.engine import Request
from mhmoe_ray.spec import ServeSpec

logger = logging.getLogger("ray.serve")
COMPLETION_TOKENS = 16
"""Largest number of tokens of a completion whose request names no number, as in OpenAI's API."""


Served = TypeVar("Served", bound=ServedModel)
Text = TypeVar("Text", bound=ServedText)


@dataclass
class ModelService(Generic[Served]):
    """The served model with the server's limits and clients, and the operations that routes of all models share."""

    answerer: Served
    model: str
    """The model's name for clients."""
    spec: ServeSpec
    """Section `serve` of the spec, with the limits of the server."""
    access: AccessControl
    start_time: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, model_name: str | None) -> None:
        """Raise RequestError if a request names another model than the served one."""
        if model_name not in (None, self.model):
            message = f"there is no model {model_name!r} here; this server has {self.model!r}"
            raise RequestError(404, message, "model", "model_not_found")

    async def begin_request(self, client: Client) -> None:
        """Count one more request of a client against its rate limit.

        Raises:
            RequestError: the client has used up a rate limit, or the rate limiter does not answer in time.
        """
        # The wait has a timeout, because the rate limiter may be another process, which does not answer while it is
        # restarted.
        try:
            async with asyncio.timeout(self.spec.request_timeout):
                await client.begin_request()
        except TimeoutError as e:
            raise timeout_error(self.spec.request_timeout) from e


class TextService(ModelService[Text]):
    """A served model that reads texts (a decoder or an encoder), and the operations that its routes share."""

    async def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, with a start token in front if the model was trained with one."""
        # A thread encodes the prompt, because a long prompt takes seconds and streams must go on meanwhile.
        return await asyncio.to_thread(self.answerer.encode, prompt)

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        # A thread decodes the tokens, because a long text takes a while and streams must go on meanwhile.
        return await asyncio.to_thread(self.answerer.decode, tokens)

    def log_prompts(self, client: Client, prompts: Iterable[Sequence[int]]) -> None:
        """Log the texts of a client's request if the spec sets `serve.log_prompts`.

        Args:
            client: the client, whose name is logged.
            prompts: token ids of each text.
        """
        if self.spec.log_prompts:
            for token_ids in prompts:
                logger.info("%s asks: %r", client.name or "somebody", self.answerer.decode(token_ids))

    def check_max_tokens(self, max_tokens: int, param: str) -> None:
        """Raise RequestError if a request asks for more tokens than the server allows.

        Args:
            max_tokens: largest number of tokens of the answer.
            param: name of the request's field, for the error.
        """
        if max_tokens > self.spec.max_tokens:
            message = f"{param} is {max_tokens}, and this server allows at most {self.spec.max_tokens}"
            raise RequestError(400, message, param)

    def chat_max_tokens(self, max_completion_tokens: int | None, max_tokens: int | None) -> int:
        """Return the largest number of tokens of the answer to a conversation.

        Args:
            max_completion_tokens: the request's field of this name, which takes precedence.
            max_tokens: the request's field of this name. If both fields are None, the server's limit applies.

        Raises:
            RequestError: the request asks for more tokens than the server allows.
        """
        limit = max_completion_tokens or max_tokens or self.spec.max_tokens
        self.check_max_tokens(limit, "max_completion_tokens" if max_completion_tokens else "max_tokens")
        return limit


@dataclass
class Service(TextService[Answerer]):
    """A served decoder, and the operations that the routes of completions share."""

    def __post_init__(self) -> None:
        # All requests share one pacer, because its interval depends on the number of all streams of the replica.
        self.pacer = StreamPacer(self.spec.stream_interval)

    def completion_max_tokens(self, max_tokens: int | None) -> int:
        """Return the largest number of tokens of a completion.

        Args:
            max_tokens: the request's field of this name; None for the default, which never exceeds the server's limit.

        Raises:
            RequestError: the request asks for more tokens than the server allows.
        """
        if max_tokens is None:
            return min(COMPLETION_TOKENS, self.spec.max_tokens)
        self.check_max_tokens(max_tokens, "max_tokens")
        return max_tokens

    async def prompt_ids(self, prompt: str | Sequence[int], has_answer: bool, param: str) -> tuple[int, ...]:
        """Return the token ids of a prompt, checked for unknown ids and for length.

        Args:
            prompt: a text, or token ids.
            has_answer: whether an answer follows the prompt; its first token must fit in the context too.
            param: name of the request's field, for the error.

        Raises:
            RequestError: the prompt has an unknown token, or is too long.
        """
        token_ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        self._check_tokens(token_ids, param)
        try:
            self.answerer.check_length(token_ids, has_answer)
        except ServeError as e:
            raise RequestError(400, str(e), param, "context_length_exceeded") from e
        return tuple(token_ids)

    def _check_tokens(self, token_ids: Iterable[int], param: str) -> None:
        """Raise RequestError if a token id is not in the tokenizer; `param` is the request's field, for the error."""
        tokenizer_size = self.answerer.tokenizer_size
        if unknown_token := next((token for token in token_ids if token >= tokenizer_size), None):
            raise RequestError(400, f"{param!r}: there is no token {unknown_token}; there are {tokenizer_size}", param)

    async def start_answers(
        self,
        engine_requests: Sequence[tuple[Request, int]],
        request: SamplingRequest,
        echo: bool,
        prompt_tokens: int,
        client: Client,
    ) -> Answers:
        """Start the answers to one request of a client; all choices together count as one request.

        Args:
            engine_requests: requests to the engine, one for each choice (answer), each with the number of tokens that
                the server added at the start of its prompt.
            request: the client's request, for its stop strings and logit biases.
            echo: whether each text begins with that of the prompt; see `Answerer.answer`.
            prompt_tokens: number of tokens of all prompts.
            client: the client that sent the request.

        Raises:
            RequestError: the request has unknown tokens or more choices than the server holds at a time, or the client
                has used up a rate limit, or the rate limiter does not answer in time.
        """
        self._check_tokens(map(int, request.logit_bias), "logit_bias")
        if len(engine_requests) > (max_choices := self.spec.max_concurrency + self.spec.max_waiting):
            message = f"{len(engine_requests)} choices are more than the {max_choices} that this server takes at a time"
            raise RequestError(400, message, "n")
        await self.begin_request(client)
        prompts = (engine_request.prompt_ids[added_tokens:] for engine_request, added_tokens in engine_requests)
        self.log_prompts(client, prompts)
        answers = [
            self.answerer.answer(engine_request, request.stop, echo, added_tokens)
            for engine_request, added_tokens in engine_requests
        ]
        return Answers(answers, prompt_tokens, client, self.spec.request_timeout, self.pacer)
