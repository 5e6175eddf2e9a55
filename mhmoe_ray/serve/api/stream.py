"""The pieces of one request's answers: merged, counted, and as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from mhmoe_ray.serve.answer import Piece
from mhmoe_ray.serve.api.access import Client
from mhmoe_ray.serve.api.errors import RequestError, body_of
from mhmoe_ray.serve.api.schema import Usage
from mhmoe_ray.serve.engine import BusyError, EngineError

Pieces = AsyncGenerator[tuple[int, Piece]]
"""Pieces, each with the number of its choice."""

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
DESCRIBED = {
    "description": "The answer; with `stream`, events with chunks of it as `data`, and a last one of [DONE].",
    "content": {"text/event-stream": {"schema": _EVENT}},
}

CHUNK_SECONDS = 0.004
"""Seconds between two chunks of all streams of a replica together.

On its way through Serve's proxy a chunk costs about a millisecond of a core, whatever it holds; so all chunks together
take about a quarter of a core and leave the rest to engines.
"""
LONGEST_SECONDS = 0.25
"""Longest time, in seconds, that a token waits for another one because of other streams."""


class Pace:
    """How long the tokens of a stream are collected for one chunk: the more streams a replica has, the longer."""

    def __init__(self, interval: float) -> None:
        """`interval`: smallest number of seconds between two chunks of a stream; 0 sends a chunk with each token."""
        self._interval = interval
        self._streams = set[object]()

    def goes_on(self, stream: object) -> None:
        """Record that a stream has a token, perhaps its first."""
        self._streams.add(stream)

    def ends(self, stream: object) -> None:
        """Record that a stream has no more tokens, or that nobody wants them; it may never have begun."""
        self._streams.discard(stream)

    @property
    def interval(self) -> float:
        """Seconds between two chunks of a stream, with the present number of streams."""
        if not self._interval:
            return 0.0
        return max(self._interval, min(len(self._streams) * CHUNK_SECONDS, LONGEST_SECONDS))


class Answers:
    """The answers to one request, one for each choice."""

    def __init__(
        self,
        answers: Sequence[AsyncGenerator[Piece]],
        prompt_tokens: int,
        client: Client,
        timeout: float,
        pace: Pace,
    ) -> None:
        """Take over the answers, which start when they are iterated.

        Args:
            answers: one generator of pieces for each choice.
            prompt_tokens: number of tokens of all prompts of the request.
            client: the client whose limit the tokens count against, however the answers end, unless the engine refuses
                them.
            timeout: seconds after which unfinished answers fail.
            pace: pace of all streams of this replica.
        """
        self._answers, self._prompt_tokens, self._client = answers, prompt_tokens, client
        self._timeout, self._pace = timeout, pace
        self._tokens = [0] * len(answers)

    @property
    def usage(self) -> Usage:
        answered = sum(self._tokens)
        total = self._prompt_tokens + answered
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=answered, total_tokens=total)

    async def pieces(self) -> Pieces:
        refused = False
        try:
            async with aclosing(merged(self._answers, self._timeout)) as pieces:
                async for number, piece in pieces:
                    self._tokens[number] = piece.tokens
                    yield number, piece
        except (BusyError, EngineError):
            refused = not any(self._tokens)
            raise
        finally:
            if not refused:
                self._client.used(self.usage.total_tokens)

    async def whole(self) -> list[Piece]:
        """Return each choice as one piece."""
        parts: list[list[Piece]] = [[] for _ in self._answers]
        async with aclosing(self.pieces()) as pieces:
            async for number, piece in pieces:
                parts[number].append(piece)
        return [_joined(pieces) for pieces in parts]

    async def events(
        self, chunk: Callable[[int, Piece], BaseModel], last: Callable[[], BaseModel] | None
    ) -> AsyncGenerator[str]:
        """Return the answers as server-sent events: chunks, then [DONE]; after a failure an error body in place of
        [DONE].

        This returns when the first piece has come, so that a failure before it still gets an HTTP status of its own.
        The caller must close the events.

        Args:
            chunk: returns the body for a piece of a choice.
            last: returns a body to send after all pieces; None sends none.
        """
        events = self._events(chunk, last)
        await anext(events)
        return events

    async def _events(
        self, chunk: Callable[[int, Piece], BaseModel], last: Callable[[], BaseModel] | None
    ) -> AsyncGenerator[str]:
        """Yield an empty event once the first piece has come, then the events.

        Closing a generator that has not begun would not close the answers; the empty event makes it begin.
        """
        clock = asyncio.get_running_loop().time
        held: list[list[Piece]] = [[] for _ in self._answers]
        due = [0.0] * len(held)
        """Time of the event loop's clock from which each choice may have its next chunk."""
        streams = [object() for _ in held]

        def shown(number: int, piece: Piece) -> Iterator[str]:
            held[number].append(piece)
            (self._pace.ends if piece.finish_reason else self._pace.goes_on)(streams[number])
            if clock() < due[number] and not piece.finish_reason:
                return
            whole = _joined(held[number])
            if whole.text or whole.scores or whole.finish_reason:
                held[number], due[number] = [], clock() + self._pace.interval
                yield _event(chunk(number, whole))

        error: Exception | None = None
        try:
            async with aclosing(self.pieces()) as pieces:
                found: tuple[int, Piece] | None = await anext(pieces)
                yield ""
                while found:
                    for event in shown(*found):
                        yield event
                    try:
                        found = await anext(pieces, None)
                    except Exception as e:
                        found, error = None, e
        finally:
            for stream in streams:
                self._pace.ends(stream)
        if error:
            for number, kept in enumerate(held):
                if kept and ((whole := _joined(kept)).text or whole.scores):
                    yield _event(chunk(number, whole))
            yield _event(body_of(error))
            return
        if last:
            yield _event(last())
        yield "data: [DONE]\n\n"


class EventResponse(StreamingResponse):
    """A streaming response that closes its events, however sending them ends.

    Starlette leaves that to the garbage collector, and an answer that nobody reads any more would be computed until
    then.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json()}\n\n"


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        pieces[-1].tokens,
        tuple(score for piece in pieces for score in piece.scores),
        pieces[-1].finish_reason,
    )


def late(timeout: float) -> RequestError:
    """Return the error of a request that took longer than `timeout` seconds."""
    message = f"there was no answer within {timeout:g} s; ask for less, or later"
    return RequestError(503, message, code="timeout")


async def merged(answers: Sequence[AsyncGenerator[Piece]], timeout: float) -> Pieces:
    """Yield the pieces of all answers as they come, each with the number of its answer.

    If one answer fails, or this generator is closed, all of them end.

    Raises:
        RequestError: the answers took longer than `timeout` seconds.
    """
    pieces = asyncio.Queue[tuple[int, Piece | Exception]]()

    async def follow(number: int, answer: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    pieces.put_nowait((number, piece))
        except Exception as e:
            pieces.put_nowait((number, e))

    alarm = asyncio.get_running_loop().call_later(timeout, pieces.put_nowait, (0, late(timeout)))
    tasks = [asyncio.create_task(follow(number, answer)) for number, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            number, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish_reason is not None
            yield number, piece
    finally:
        alarm.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
