"""Text generation by a serving engine in this process, whose answers arrive in a thread with an event loop."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, contextmanager
from queue import SimpleQueue
from threading import Thread, current_thread, main_thread
from typing import NamedTuple

from mhmoe_ray.serving.answer import Answerer, AnswerPiece, join_pieces
from mhmoe_ray.serving.engine import EngineError, FinishReason, Request

CONCURRENCY = 16
"""Largest number of prompts that are answered at the same time."""


class Answer(NamedTuple):
    """An answer that a model generated for a prompt."""

    text: str
    token_count: int
    finish_reason: FinishReason
    """Reason why the answer ends: "stop" at the end of a document or a stop string, "length" at a limit on tokens."""


class EngineThread:
    """Thread with an event loop, in which the answers of a serving engine arrive.

    The loop has a thread of its own, because the thread of a caller may run a loop already, as in a notebook.
    """

    def __init__(self, build_answerer: Callable[[], Answerer]) -> None:
        """Start the thread, which starts the engine by `build_answerer`, without waiting for it."""
        self._started_answerer = Future[Answerer]()
        self._thread = Thread(target=lambda: asyncio.run(self._run_loop(build_answerer)), name="answers", daemon=True)
        self._thread.start()

    async def _run_loop(self, build_answerer: Callable[[], Answerer]) -> None:
        self._loop, self._close_requested = asyncio.get_running_loop(), asyncio.Event()
        # The engine refuses requests if too many are waiting in it, so further requests wait here for a slot.
        self._slots = asyncio.Semaphore(CONCURRENCY)
        try:
            answerer = build_answerer()
        # The thread that waits for the engine gets the error.
        except BaseException as e:
            self._started_answerer.set_exception(e)
            return
        self._started_answerer.set_result(answerer)
        await self._close_requested.wait()

    @property
    def answerer(self) -> Answerer:
        """The engine with its tokenizer. This waits until the engine has started, and raises the error if it fails."""
        return self._started_answerer.result()

    def answer_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers to several requests, which are computed together. Ctrl-C ends the computation.

        The engine's failure, or its close meanwhile, is an EngineError.
        """

        async def answer_all() -> list[Answer]:
            return await asyncio.gather(*(self._answer(request) for request in requests))

        future = asyncio.run_coroutine_threadsafe(answer_all(), self._loop)
        try:
            with _report_close():
                return future.result()
        # Ctrl-C raises a BaseException, too. The coroutine is then cancelled, and so aborts its requests in the engine.
        except BaseException:
            future.cancel()
            raise

    async def _answer(self, request: Request) -> Answer:
        piece = join_pieces([piece async for piece in self._pieces(request)])
        assert piece.finish_reason is not None
        return Answer(piece.text, piece.token_count, piece.finish_reason)

    async def _pieces(self, request: Request) -> AsyncGenerator[AnswerPiece]:
        async with self._slots, aclosing(self.answerer.answer(request)) as pieces:
            async for piece in pieces:
                yield piece

    def pieces(self, request: Request) -> Iterator[AnswerPiece]:
        """Yield the pieces of the answer to a request as they are generated; errors are those of `answer_all`."""
        queue = SimpleQueue[AnswerPiece | None]()

        async def collect() -> None:
            try:
                async with aclosing(self._pieces(request)) as pieces:
                    async for piece in pieces:
                        queue.put(piece)
            finally:
                queue.put(None)

        future = asyncio.run_coroutine_threadsafe(collect(), self._loop)
        try:
            while (piece := queue.get()) is not None:
                yield piece
            with _report_close():
                future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Close the engine, and end the thread."""
        try:
            answerer = self.answerer
        # An engine that could not be started need not be closed; whoever waited for it got the error.
        except Exception:
            return
        answerer.engine.close()
        self._loop.call_soon_threadsafe(self._close_requested.set)
        self._thread.join()


@contextmanager
def _report_close() -> Iterator[None]:
    """Turn the cancellation of a computation in the event loop, because the engine was closed, into an EngineError."""
    try:
        yield
    except CancelledError as e:
        raise EngineError("it was closed") from e


def close_abandoned_engine(engine: EngineThread) -> None:
    """Close the engine of a model that its user left open, when the model is collected or the process ends."""
    # Python may collect the model in a thread of the engine, which cannot wait for its own end, so a new thread closes
    # the engine. At the end of the process, this code runs in the main thread, and new threads can no longer start.
    if current_thread() is main_thread():
        engine.close()
    else:
        Thread(target=engine.close, name="close").start()
