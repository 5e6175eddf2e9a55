"""Streams of answers: pieces of all answers to a request are merged, counted, and sent as server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from mhmoe_ray.serving.answer import AnswerPiece, join_pieces
from mhmoe_ray.serving.api.access import Client
from mhmoe_ray.serving.api.errors import RequestError, error_body
from mhmoe_ray.serving.api.schema import Usage
from mhmoe_ray.serving.engine import BusyError, EngineError, ServedWeights

Pieces = AsyncGenerator[tuple[int, AnswerPiece]]
"""Pieces of the answers to a request, each with the index of its answer (OpenAI's choice)."""

EMPTY: Mapping[str, str] = MappingProxyType({})
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
RESPONSE_DESCRIPTION = {
    "description": "The answer; with `stream`, events with chunks of it as `data`, and a last event [DONE].",
    "content": {"text/event-stream": {"schema": _EVENT}},
}

# On its way through Serve's proxy, a chunk of any size costs about a millisecond of a core with object references, and
# less with gRPC. So a chunk every 4 milliseconds takes less than a quarter of a core and leaves the rest to engines.
CHUNK_SECONDS = 0.004
"""Mean seconds between two chunks of a replica with many streams, over all of its streams."""
MAX_DELAY_SECONDS = 0.25
"""Longest time, in seconds, that a token waits because of other streams."""


class StreamPacer:
    """Pacer of a replica's streams: the time between two chunks grows with the number of streams."""

    def __init__(self, interval: float) -> None:
        """Create a pacer; `interval` is the smallest time between two chunks in seconds, and 0 sends each token."""
        self._interval = interval
        self._streams = set[object]()

    def record_token(self, stream: object) -> None:
        """Count a stream as open from its first token on; later tokens have no effect."""
        self._streams.add(stream)

    def remove_stream(self, stream: object) -> None:
        """Remove a stream that has ended, if it is there."""
        self._streams.discard(stream)

    @property
    def interval(self) -> float:
        """Seconds between two chunks of a stream at present; 0 sends each token at once."""
        if not self._interval:
            return 0.0
        return max(self._interval, min(len(self._streams) * CHUNK_SECONDS, MAX_DELAY_SECONDS))


class Answers:
    """The answers to one HTTP request: one for each choice."""

    def __init__(
        self,
        answers: Sequence[AsyncGenerator[AnswerPiece]],
        prompt_tokens: int,
        client: Client,
        timeout: float,
        pacer: StreamPacer,
        weights: ServedWeights,
    ) -> None:
        """Take over the answers, which start when they are iterated, and fail after `timeout` seconds.

        The headers of the response, and the last chunk of a stream, name the weights.
        """
        self.headers = weights.headers
        self._answers, self._prompt_tokens, self._client = answers, prompt_tokens, client
        self._timeout, self._pacer = timeout, pacer
        self._tokens = [0] * len(answers)

    @property
    def usage(self) -> Usage:
        """Numbers of tokens of the request so far."""
        answer_tokens = sum(self._tokens)
        total = self._prompt_tokens + answer_tokens
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=answer_tokens, total_tokens=total)

    async def pieces(self) -> Pieces:
        """Yield the pieces of all choices as they arrive, each with the index of its choice.

        At the end, the tokens so far count against the client's rate limit, unless the engine refused the request.
        """
        is_refused = False
        try:
            async with aclosing(merge_answers(self._answers, self._timeout)) as pieces:
                async for number, piece in pieces:
                    self._tokens[number] = piece.token_count
                    yield number, piece
        except (BusyError, EngineError):
            is_refused = not any(self._tokens)
            raise
        finally:
            # The tokens up to now count even if the client leaves early or an answer fails, but not if the engine
            # refused the request.
            if not is_refused:
                self._client.record_tokens(self.usage.total_tokens)

    async def collect_pieces(self) -> list[AnswerPiece]:
        """Return the complete answer of each choice as one piece."""
        pieces_by_choice: list[list[AnswerPiece]] = [[] for _ in self._answers]
        async with aclosing(self.pieces()) as pieces:
            async for number, piece in pieces:
                pieces_by_choice[number].append(piece)
        return [join_pieces(pieces) for pieces in pieces_by_choice]

    async def events(
        self,
        build_chunk: Callable[[int, AnswerPiece], BaseModel | None],
        build_usage_chunk: Callable[[], BaseModel] | None,
    ) -> AsyncGenerator[str]:
        """Wait for the first piece, and return the answers as server-sent events; an earlier failure is raised.

        The events are chunks, none where the builder returns None, the usage chunk if it has a builder, then [DONE] or,
        after a failure, an error body. The caller must close the generator.
        """
        events = self._events(build_chunk, build_usage_chunk)
        # The first event is empty and comes with the first piece. A failure before this piece is therefore raised here,
        # while the response can still have the HTTP status of an error.
        await anext(events)
        return events

    async def _events(
        self,
        build_chunk: Callable[[int, AnswerPiece], BaseModel | None],
        build_usage_chunk: Callable[[], BaseModel] | None,
    ) -> AsyncGenerator[str]:
        """Yield an empty event once the first piece has arrived, then the events that `events` describes."""
        clock = asyncio.get_running_loop().time
        pending_pieces: list[list[AnswerPiece]] = [[] for _ in self._answers]
        due_times = [0.0] * len(pending_pieces)
        """Earliest time of each choice's next chunk, by the event loop's clock."""
        streams = [object() for _ in pending_pieces]
        unfinished = set(range(len(pending_pieces)))

        def chunk_events(number: int, piece: AnswerPiece) -> Iterator[str]:
            pending_pieces[number].append(piece)
            (self._pacer.remove_stream if piece.finish_reason else self._pacer.record_token)(streams[number])
            if clock() < due_times[number] and not piece.finish_reason:
                return
            joined_piece = join_pieces(pending_pieces[number])
            if joined_piece.text or joined_piece.scores or joined_piece.finish_reason:
                pending_pieces[number], due_times[number] = [], clock() + self._pacer.interval
                if piece.finish_reason:
                    unfinished.discard(number)
                is_last = not unfinished and build_usage_chunk is None
                if chunk := build_chunk(number, joined_piece):
                    yield _format_event(chunk, self.headers if is_last else EMPTY)

        error: Exception | None = None
        try:
            async with aclosing(self.pieces()) as pieces:
                next_piece: tuple[int, AnswerPiece] | None = await anext(pieces)
                # `events` waits for this empty event, so that this generator has started before anyone closes it.
                # Closing a generator that has not started would not close the answers.
                yield ""
                while next_piece:
                    for event in chunk_events(*next_piece):
                        yield event
                    # Any failure of an answer is reported as an event, since the HTTP status has been sent.
                    try:
                        next_piece = await anext(pieces, None)
                    except Exception as e:
                        next_piece, error = None, e
        finally:
            for stream in streams:
                self._pacer.remove_stream(stream)
        if error:
            # Pieces that still waited for their next chunk are sent, so that tokens that were computed before the
            # failure are not lost.
            for number, unsent_pieces in enumerate(pending_pieces):
                if (
                    unsent_pieces
                    and ((joined_piece := join_pieces(unsent_pieces)).text or joined_piece.scores)
                    and (chunk := build_chunk(number, joined_piece))
                ):
                    yield _format_event(chunk)
            yield _format_event(error_body(error))
            return
        if build_usage_chunk:
            yield _format_event(build_usage_chunk(), self.headers)
        yield "data: [DONE]\n\n"


class EventResponse(StreamingResponse):
    """A response that streams server-sent events, and closes their generator in any case."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], headers: Mapping[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        # Without this call, the generator would be closed only by the garbage collector, and until then the engine
        # would compute an answer without a reader.
        finally:
            await self._events.aclose()


def _format_event(body: BaseModel, fields: Mapping[str, str] = EMPTY) -> str:
    text = json.dumps({**body.model_dump(), **fields}) if fields else body.model_dump_json()
    return f"data: {text}\n\n"


def timeout_error(timeout: float) -> RequestError:
    """Return the error of a request that took longer than `timeout` seconds."""
    message = f"there was no answer within {timeout:g} s; ask for less, or later"
    return RequestError(503, message, code="timeout")


async def merge_answers(answers: Sequence[AsyncGenerator[AnswerPiece]], timeout: float) -> Pieces:
    """Yield the pieces of all answers as they arrive, each with the index of its answer.

    All answers end if one fails, the generator is closed, or `timeout` seconds are over, which is a RequestError.
    """
    pieces = asyncio.Queue[tuple[int, AnswerPiece | Exception]]()

    async def forward_pieces(number: int, answer: AsyncGenerator[AnswerPiece]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    pieces.put_nowait((number, piece))
        except Exception as e:
            pieces.put_nowait((number, e))

    # The timeout is an item of the queue like a failed answer, so it also ends a wait for the next piece.
    timeout_handle = asyncio.get_running_loop().call_later(timeout, pieces.put_nowait, (0, timeout_error(timeout)))
    tasks = [asyncio.create_task(forward_pieces(number, answer)) for number, answer in enumerate(answers)]
    try:
        open_count = len(tasks)
        while open_count:
            number, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            open_count -= piece.finish_reason is not None
            yield number, piece
    finally:
        timeout_handle.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
