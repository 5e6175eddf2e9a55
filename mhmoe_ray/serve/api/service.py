"""The functions that all routes share: checks of requests, tokenizing and answering."""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.answer import Answerer
from mhmoe_ray.serve.api.access import Access, Client
from mhmoe_ray.serve.api.errors import RequestError
from mhmoe_ray.serve.api.schema import Choosing
from mhmoe_ray.serve.api.stream import Answers, Pace, late
from mhmoe_ray.serve.engine import Request
from mhmoe_ray.spec import ServeSpec

logger = logging.getLogger("ray.serve")


@dataclass
class Service:
    answerer: Answerer
    model: str
    """The model's name for clients."""
    spec: ServeSpec
    """Limits of the server."""
    access: Access
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.pace = Pace(self.spec.stream_interval)

    def check_model(self, named: str | None) -> None:
        if named not in (None, self.model):
            message = f"there is no model {named!r} here; this server has {self.model!r}"
            raise RequestError(404, message, "model", "model_not_found")

    def check_max_tokens(self, wanted: int, param: str) -> None:
        if wanted > self.spec.max_tokens:
            message = f"{param} is {wanted}, and this server allows at most {self.spec.max_tokens}"
            raise RequestError(400, message, param)

    async def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt; computed in a thread, because a long prompt takes seconds while streams go
        on."""
        return await asyncio.to_thread(self.answerer.encode, prompt)

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids; computed in a thread, as in `encode`."""
        return await asyncio.to_thread(self.answerer.decode, tokens)

    async def prompt_ids(self, prompt: str | Sequence[int], answer: bool, param: str) -> tuple[int, ...]:
        """Return the token ids of a prompt, checked for unknown ids and for length.

        `answer` says whether an answer is to follow the prompt; its first token then needs room too.

        Raises:
            RequestError: there is no such token, or the prompt is too long.
        """
        ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        self._check_tokens(ids, param)
        try:
            self.answerer.check_length(ids, answer)
        except ServeError as e:
            raise RequestError(400, str(e), param, "context_length_exceeded") from e
        return tuple(ids)

    def _check_tokens(self, ids: Iterable[int], param: str) -> None:
        known = self.answerer.tokens
        if unknown := next((token for token in ids if token >= known), None):
            raise RequestError(400, f"{param!r}: there is no token {unknown}; there are {known}", param)

    async def answers(
        self, asked: Sequence[tuple[Request, int]], request: Choosing, echo: bool, prompt_tokens: int, client: Client
    ) -> Answers:
        """Start the answers to one request of a client; all choices together count as one request.

        Args:
            asked: requests to the engine, one for each choice, each with the number of tokens at its start that the
                server added.
            request: the client's request, for its stop strings and biases.
            echo: whether each text begins with that of the prompt; see `Answerer.answer`.
            prompt_tokens: number of tokens of all prompts.
            client: the client that asks.

        Raises:
            RequestError: the request names unknown tokens or has more choices than the server ever holds, or the client
                has used up its share, or the deployment that counts shares does not answer in time.
        """
        self._check_tokens(map(int, request.logit_bias), "logit_bias")
        if len(asked) > (most := self.spec.max_concurrency + self.spec.max_waiting):
            message = f"{len(asked)} choices are more than the {most} that this server takes at a time"
            raise RequestError(400, message, "n")
        try:
            async with asyncio.timeout(self.spec.request_timeout):
                await client.begin()
        except TimeoutError as e:
            raise late(self.spec.request_timeout) from e
        if self.spec.log_prompts:
            for one, own in asked:
                logger.info("%s asks: %r", client.name or "somebody", self.answerer.decode(one.prompt_ids[own:]))
        answers = [self.answerer.answer(one, request.stop, echo, own) for one, own in asked]
        return Answers(answers, prompt_tokens, client, self.spec.request_timeout, self.pace)
