"""Requests of clients in an engine of encoders or vision models; each input of a request gets one answer."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from mhmoe_ray.serving.engine.background import RequestTimes
from mhmoe_ray.serving.engine.request import EngineError

Input = TypeVar("Input")
Output = TypeVar("Output")


class ClientRequest(RequestTimes, Generic[Input, Output]):
    """State of a client's request in an engine, from its arrival to its end."""

    def __init__(self, client: str) -> None:
        super().__init__()
        self.client = client
        self.input_tokens = 0
        """Number of tokens and patches of the inputs that were handed to the engine."""
        self.answer_tokens = 0
        self.is_started = False
        self.waiting_inputs = deque[InputState[Input, Output]]()
        """Waiting inputs; the request is in the engine's queue as long as there are any."""


@dataclass(eq=False)
class InputState(Generic[Input, Output]):
    """State of one input of a request in an engine, with the future that receives its answer."""

    value: Input
    request: ClientRequest[Input, Output]
    answer: asyncio.Future[Output]
    loop: asyncio.AbstractEventLoop
    is_started: bool = False
    token_count: int = 0
    """Number of tokens of the answer so far."""

    def deliver(self, answer: Output | EngineError) -> None:
        """Pass an answer or an error to the coroutine that waits for it. The engine's thread calls this."""

        def set_answer() -> None:
            # If the client has gone away, its future was cancelled and takes no answer.
            if self.answer.done():
                return
            if isinstance(answer, EngineError):
                self.answer.set_exception(answer)
            else:
                self.answer.set_result(answer)

        # A loop may be closed while one of its requests is still in the engine, as when `asyncio.run` ends early.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(set_answer)
