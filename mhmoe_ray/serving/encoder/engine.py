"""The engine of encoders: a thread computes up to `max_concurrency` inputs of all requests in one forward pass.

Captions take one pass for each of their tokens.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Condition, Thread

import numpy as np
import torch

from mhmoe_ray.model.captions import write_captions
from mhmoe_ray.model.encoder import Encoded, Encoder, EncoderBatch, Group, GroupSize
from mhmoe_ray.serving.encoder.request import EncodeRequest, Encoding
from mhmoe_ray.serving.engine import BusyError, EngineError, Stats
from mhmoe_ray.spec import ServeSpec


@dataclass
class _State:
    """Request in the engine, with the future of its answer."""

    request: EncodeRequest
    answer: "asyncio.Future[Encoding]"
    loop: asyncio.AbstractEventLoop
    arrival_time: float = field(default_factory=time.monotonic)


class EncoderEngine:
    """Engine of one encoder, in one process, on a CPU or one GPU."""

    def __init__(self, model: Encoder, seq_len: int, start_token: int, spec: ServeSpec) -> None:
        """Start the engine and its thread.

        Args:
            model: the model in evaluation mode, on its device.
            seq_len: largest number of tokens of a text, with the start token.
            start_token: the token before a text, which also ends a caption.
            spec: precision, threads, and limits on numbers of requests.
        """
        self.seq_len, self._model, self._start_token, self._spec = seq_len, model, start_token, spec
        self._device = model.embedding.weight.device
        self._condition = Condition()
        self._waiting = deque[deque[_State]]()
        """Inputs that wait, of each request of a client; the requests take turns."""
        self._admitted = 0
        """Number of requests of clients that are decoded, computed or wait."""
        self._running: list[_State] = []
        moe = model.spec.moe
        self._stats = Stats(count_LE=[[0] * (moe.experts if moe else 0) for _ in range(model.spec.moe_layers)])
        self._failure: Exception | None = None
        self._is_closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Return a context for one request of a client, in which its images are decoded and its inputs are encoded.

        Raises:
            BusyError: too many requests of clients are in the engine already.
            EngineError: the engine is broken or closed.
        """
        with self._condition:
            if self._failure or self._is_closed:
                raise EngineError(self.failure_reason or "it was closed")
            if self._admitted >= self._spec.max_concurrency + self._spec.max_waiting:
                raise BusyError(f"{self._admitted} requests are computed or wait already")
            self._admitted += 1
        try:
            yield
        finally:
            with self._condition:
                self._admitted -= 1

    async def encode(self, requests: Sequence[EncodeRequest]) -> list[Encoding]:
        """Return the answers to the inputs of one request of a client.

        Raises:
            EngineError: the engine is broken or closed.
        """
        loop = asyncio.get_running_loop()
        states = deque(_State(request, loop.create_future(), loop) for request in requests)
        answers = [state.answer for state in states]
        with self._condition:
            if self._failure or self._is_closed:
                raise EngineError(self.failure_reason or "it was closed")
            self._waiting.append(states)
            self._condition.notify()
        try:
            return list(await asyncio.gather(*answers))
        finally:
            # The rest of a request that failed or whose client has gone away is not computed.
            with self._condition:
                states.clear()

    @property
    def failure_reason(self) -> str | None:
        """Exception that broke the engine, as text; None while it works."""
        return f"{type(self._failure).__name__}: {self._failure}" if self._failure else None

    def stats(self) -> Stats:
        """Return the statistics of the engine up to now. A step is a forward pass over all requests of a round."""
        with self._condition:
            stats = deepcopy(self._stats)
            stats.waiting, stats.running = sum(map(len, self._waiting)), len(self._running)
            return stats

    def close(self) -> None:
        """Stop the engine and fail its unfinished requests. Must be called before the process ends."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        """Compute rounds until the engine is closed or fails, then fail all requests. The thread calls this."""
        # torch keeps this number for each calling thread, so it is set in the thread that computes.
        torch.set_num_threads(self._spec.cpus_per_replica)
        try:
            while states := self._next_states():
                self._finish(states, self._compute([state.request for state in states]))
        # Any exception of a round breaks the engine, and its requests must learn that nobody computes them any more.
        except Exception as e:
            self._failure = e
        with self._condition:
            self._is_closed = True
            unfinished_states = [*self._running, *(state for states in self._waiting for state in states)]
            self._running, self._waiting = [], deque()
        for state in unfinished_states:
            _deliver(state, EngineError(self.failure_reason or "it was closed"))

    def _next_states(self) -> list[_State]:
        """Wait for requests and return those of the next round; return none once the engine is closed."""
        with self._condition:
            while not any(self._waiting) and not self._is_closed:
                self._waiting.clear()
                self._condition.wait()
            if self._is_closed:
                return []
            self._running = []
            while self._waiting and len(self._running) < self._spec.max_concurrency:
                states = self._waiting.popleft()
                if states:
                    self._running.append(states.popleft())
                    self._waiting.append(states)
            for state in self._running:
                self._stats.queue.add(time.monotonic() - state.arrival_time)
            return self._running

    def _finish(self, states: Sequence[_State], encodings: Sequence[Encoding]) -> None:
        """Deliver the answers of a round and count them."""
        with self._condition:
            self._running = []
            self._stats.requests += len(states)
            for state, encoding in zip(states, encodings, strict=True):
                self._stats.first_token.add(time.monotonic() - state.arrival_time)
                is_text = state.request.image is None
                self._stats.prompt_tokens += len(state.request.token_ids) if is_text else self._model.image_tokens
                self._stats.answer_tokens += len(encoding.caption_ids or ())
        for state, encoding in zip(states, encodings, strict=True):
            _deliver(state, encoding)

    @torch.inference_mode()
    def _compute(self, requests: Sequence[EncodeRequest]) -> list[Encoding]:
        """Return the answers to the requests of a round."""
        encodings = [Encoding()] * len(requests)
        captioned = [number for number, request in enumerate(requests) if request.is_caption]
        images = [n for n, request in enumerate(requests) if request.image is not None and not request.is_caption]
        texts = [number for number, request in enumerate(requests) if request.image is None]
        half = self._spec.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16) if half else nullcontext():
            if images or texts:
                vectors = self._vectors([requests[n].image for n in images], [requests[n].token_ids for n in texts])
                for number, encoding in zip([*images, *texts], vectors, strict=True):
                    encodings[number] = encoding
            if captioned:
                image_NYXC = self._image_tensor([requests[number].image for number in captioned])
                captions = write_captions(self._model, image_NYXC, self._start_token, self.seq_len - 1)
                for number, caption in zip(captioned, captions, strict=True):
                    encodings[number] = Encoding(caption_ids=caption)
        return encodings

    def _image_tensor(self, images: Sequence[np.ndarray | None]) -> torch.Tensor:
        size = self._model.spec.encoder.image_size if self._model.spec.encoder else 0
        pixels = np.stack([image for image in images if image is not None]) if images else np.empty((0, size, size, 3))
        return torch.from_numpy(pixels.astype(np.uint8)).to(self._device)

    def _vectors(self, images: Sequence[np.ndarray | None], texts: Sequence[Sequence[int]]) -> list[Encoding]:
        """Return the vectors of images, then those of texts, from one forward pass."""
        image_NYXC = self._image_tensor(images)
        encoder = self._model.spec.encoder
        assert encoder is not None
        length = max((len(text) for text in texts), default=1)
        # The start token fills up shorter texts; attention does not see it there.
        token_NT = torch.full((len(texts), length), self._start_token, device=self._device)
        is_token_NT = torch.zeros(len(texts), length, dtype=torch.bool, device=self._device)
        for row, text in enumerate(texts):
            token_NT[row, : len(text)] = torch.tensor(text, device=self._device)
            is_token_NT[row, : len(text)] = True
        empty = torch.empty(0, dtype=torch.int64, device=self._device)
        patch_hidden_NP = torch.zeros(len(images), encoder.patches, dtype=torch.bool, device=self._device)
        group = Group(GroupSize(len(images), len(texts), is_joint=False), 0, 0, ())
        batch = EncoderBatch((group,), image_NYXC, patch_hidden_NP, token_NT, is_token_NT, empty, empty, empty, empty)
        encoded = self._model.encode(batch)
        head = self._model.match
        assert head is not None
        vectors_NW = torch.cat([head.image_vectors(encoded.image_NSM[:, 0]), head.text_vectors(encoded.text_NTM[:, 0])])
        expert_NLSH = self._count_routes(encoded)
        return [
            Encoding(vector, expert_LSH=expert_NLSH[number] if number < len(images) and expert_NLSH.size else None)
            for number, vector in enumerate(vectors_NW.float().cpu().numpy())
        ]

    def _count_routes(self, encoded: Encoded) -> np.ndarray:
        """Count the routes of a pass; return the first choices of its images, (images, layers, positions, heads)."""
        images, positions, _ = encoded.image_NSM.shape
        moe = self._model.spec.moe
        heads = moe.heads if moe else 1
        choices = []
        # Router smear averages all experts of a sample, so that its positions choose none.
        layers = [] if moe is None or moe.router == "smear" else encoded.routing
        for layer, routing in enumerate(layers):
            counts = routing.count_E.tolist()
            with self._condition:
                self._stats.count_LE[layer] = [a + b for a, b in zip(self._stats.count_LE[layer], counts, strict=True)]
            rows = routing.expert_NK[: images * positions * heads, 0]
            choices.append(rows.view(images, positions, heads).cpu().numpy())
        with self._condition:
            self._stats.steps += 1
            self._stats.step_tokens += encoded.image_NSM.shape[:2].numel() + encoded.text_NTM.shape[:2].numel()
        return np.stack(choices, 1) if choices else np.empty(0)


def _deliver(state: _State, answer: Encoding | Exception) -> None:
    """Pass an answer or an error to the coroutine of a request."""

    def set_answer() -> None:
        # A client that has gone away has cancelled its future.
        if state.answer.done():
            return
        if isinstance(answer, Exception):
            state.answer.set_exception(answer)
        else:
            state.answer.set_result(answer)

    # A loop may be closed while one of its requests is still in the engine, as when `asyncio.run` ends early.
    if not state.loop.is_closed():
        state.loop.call_soon_threadsafe(set_answer)
