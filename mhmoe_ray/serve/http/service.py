"""What all routes share."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.answer import Answerer, Piece
from mhmoe_ray.serve.http.access import Access
from mhmoe_ray.serve.http.errors import RequestError
from mhmoe_ray.spec import ServeSpec


@dataclass
class Service:
    answerer: Answerer
    model: str
    """Its name for clients."""
    spec: ServeSpec
    """Limits."""
    access: Access
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, named: str | None) -> None:
        if named not in (None, self.model):
            message = f"there is no model {named!r} here; this server has {self.model!r}"
            raise RequestError(404, message, "model", "model_not_found")

    def check_max_tokens(self, wanted: int) -> None:
        if wanted > self.spec.max_tokens:
            message = f"max_tokens is {wanted}, and this server allows at most {self.spec.max_tokens}"
            raise RequestError(400, message, "max_tokens")

    def prompt_ids(self, prompt: str | Sequence[int], answer: bool) -> tuple[int, ...]:
        """Token ids of a prompt that fits; `answer` says whether anything is to follow it."""
        known = self.answerer.tokenizer.get_vocab_size()
        ids = self.answerer.encode(prompt) if isinstance(prompt, str) else prompt
        if unknown := next((token for token in ids if token >= known), None):
            raise RequestError(400, f"'prompt': there is no token {unknown}; there are {known}", "prompt")
        try:
            self.answerer.check_length(ids, answer)
        except ServeError as e:
            raise RequestError(400, str(e), "prompt", "context_length_exceeded") from e
        return tuple(ids)


async def merged(answers: Sequence[AsyncGenerator[Piece]], timeout: float) -> AsyncGenerator[tuple[int, Piece]]:
    """Pieces of all answers as they come, each with its answer's number. When one fails, or this is closed, all end.

    Raises:
        RequestError: they took longer than so many seconds.
    """
    deadline = time.monotonic() + timeout
    pieces = asyncio.Queue[tuple[int, Piece | Exception]]()

    async def follow(number: int, answer: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    pieces.put_nowait((number, piece))
        except Exception as e:
            pieces.put_nowait((number, e))

    tasks = [asyncio.create_task(follow(number, answer)) for number, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            try:
                number, piece = await asyncio.wait_for(pieces.get(), deadline - time.monotonic())
            except TimeoutError:
                message = f"there was no answer within {timeout:g} s; ask for less, or later"
                raise RequestError(503, message, code="timeout") from None
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish_reason is not None
            yield number, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
