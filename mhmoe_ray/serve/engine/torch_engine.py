"""The engine of our own decoder: one process, a CPU or one GPU.

A thread of its own computes step after step for all requests together and hands tokens over to whoever waits for them.
On a CPU an answer is the same to the last bit whatever else is in the batch (`paged.py`).
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from copy import deepcopy
from threading import Condition, Thread

import torch
from torch import Tensor

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serve.engine.blocks import BlockPool, blocks_for
from mhmoe_ray.serve.engine.paged import PagedCache, PagedStep, Span
from mhmoe_ray.serve.engine.request import BusyError, EngineError, Request, Scored, Update
from mhmoe_ray.serve.engine.sampling import Chooser, scored
from mhmoe_ray.serve.engine.schedule import Deliver, Part, Scheduler, Sequence
from mhmoe_ray.serve.engine.stats import Stats

RECENT = 10.0
BUDGET = {"cpu": 256, "cuda": 2048}
"""Tokens of prompts in a step, about."""


class TorchEngine:
    def __init__(
        self,
        model: Decoder,
        ends: frozenset[int],
        known: int,
        seq_len: int,
        *,
        concurrency: int,
        cache_tokens: int | None = None,
        queue: int | None = None,
    ) -> None:
        """Args:
        model: with all experts, in evaluation mode, on its device.
        ends: tokens that end an answer and are no part of it.
        known: tokens that the tokenizer has; the model may have more rows, which have no text.
        seq_len: tokens that prompt and answer may have together.
        concurrency: requests that are computed at a time.
        cache_tokens: tokens whose keys and values there is room for; by default, so many that no request of these waits
            for room.
        queue: requests that may wait; by default any number.
        """
        self._model, self._ends, self._known, self._seq_len, self._queue = model, ends, known, seq_len, queue
        self._device = model.embedding.weight.device
        blocks = blocks_for(cache_tokens) if cache_tokens else concurrency * blocks_for(seq_len)
        # A single request of full length must fit, or it would wait for ever.
        self._pool = BlockPool(max(blocks, blocks_for(seq_len)))
        dtype = model.blocks[0].attention.qkv.weight.dtype  # type: ignore[union-attr]
        self._bfloat16 = dtype == torch.bfloat16
        self._cache = PagedCache(model.spec, self._pool.size, dtype, self._device)  # type: ignore[arg-type]
        self._scheduler = Scheduler(self._pool, concurrency, BUDGET[self._device.type])
        self._choosers: dict[Sequence, Chooser] = {}
        self._wake = Condition()
        self._stats = Stats()
        self._recent = deque[float](maxlen=1_000_000)
        """When the newest tokens came."""
        moe = model.spec.moe
        self._count_LE = torch.zeros(model.spec.moe_layers, moe.experts if moe else 0, dtype=torch.long)
        self._broken: Exception | None = None
        self._closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def seq_len(self) -> int:
        return self._seq_len

    async def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        """See `Engine`."""
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[Update | Exception]()

        def deliver(update: Update | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(updates.put_nowait, update)

        sequence = self._add(request, deliver)
        try:
            while True:
                update = await updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update.finish:
                    return
        finally:
            with self._wake:
                sequence.gone = True  # where it ended, it is gone already

    def stats(self) -> Stats:
        """See `Engine`."""
        with self._wake:
            found = deepcopy(self._stats)
            found.waiting, found.running = self._scheduler.waiting, len(self._scheduler.running)
            since = time.monotonic() - RECENT
            while self._recent and self._recent[0] < since:
                self._recent.popleft()
            found.answer_rate = len(self._recent) / RECENT
            found.cache_used = 1 - self._pool.free / self._pool.size
            found.count_LE = self._count_LE.tolist()
            return found

    @property
    def why_broken(self) -> str | None:
        """None as long as it works."""
        return f"{type(self._broken).__name__}: {self._broken}" if self._broken else None

    def close(self) -> None:
        """See `Engine`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _add(self, request: Request, deliver: Deliver) -> Sequence:
        room = min(request.sampling.max_tokens, self._seq_len - len(request.prompt_ids))
        sequence = Sequence(request, room, deliver)
        with self._wake:
            if self._broken or self._closed:
                raise EngineError(self.why_broken or "it was closed")
            if self._queue is not None and self._scheduler.waiting >= self._queue:
                raise BusyError(f"{self._queue} requests wait already")
            self._choosers[sequence] = Chooser(request.sampling)
            self._scheduler.add(sequence)
            self._wake.notify()
        return sequence

    def _run(self) -> None:
        """The thread's own."""
        try:
            while parts := self._next():
                self._step(parts)
            error: Exception = EngineError("it was closed")
        except Exception as e:
            self._broken = error = e
        with self._wake:
            for sequence in self._scheduler.everyone():
                sequence.deliver(EngineError(self.why_broken or str(error)))
                self._end(sequence)

    def _next(self) -> list[Part]:
        """Parts of the next step, once there are some; none when the engine is closed."""
        with self._wake:
            while not self._closed:
                for sequence in self._scheduler.everyone():
                    if sequence.gone:
                        self._end(sequence)
                parts = self._scheduler.next()
                if parts:
                    for part in parts:
                        self._begun(part.sequence)
                    return parts
                self._wake.wait()
            return []

    def _begun(self, sequence: Sequence) -> None:
        if not sequence.begun:
            sequence.begun = True
            self._stats.queue.add(time.monotonic() - sequence.arrived)
            self._stats.prompt_tokens += len(sequence.request.prompt_ids)
            self._stats.reused_tokens += sequence.computed

    @torch.inference_mode()
    def _step(self, parts: list[Part]) -> None:
        logits_RV = self._computed(parts)
        at = 0
        for part in parts:
            sequence, rows = part.sequence, _wanted(part)
            update = self._said(part, logits_RV[at : at + rows])
            at += rows
            with self._wake:
                self._scheduler.computed(part)
                if update and update.tokens:
                    self._spoke(sequence)
                    sequence.ids.append(update.tokens[0].token)
                if update and update.finish:
                    self._end(sequence)
            if update:
                sequence.deliver(update)

    def _computed(self, parts: list[Part]) -> Tensor:
        """Logits of all rows that are wanted, in CPU memory."""
        spans = [Span(p.sequence.blocks, p.start, p.tokens, _wanted(p)) for p in parts]
        past = PagedStep(self._cache, spans)
        token_1T = torch.zeros(1, past.room, dtype=torch.long)
        new = [t for p in parts for t in p.sequence.ids[p.start : p.start + p.tokens]]
        token_1T[0, : past.tokens] = torch.tensor(new)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            output = self._model(token_1T.to(self._device), past)
        for count_E, routing in zip(self._count_LE, output.routing, strict=True):
            rows = len(routing.expert_NK) // past.room * past.tokens  # without those that fill up
            count_E += torch.bincount(routing.expert_NK[:rows].flatten().cpu(), minlength=len(count_E))
        self._stats.steps += 1
        self._stats.step_tokens += past.tokens
        logits_RV: Tensor = output.logits_BTV[0, : past.wanted_rows, : self._known].float().cpu()
        return logits_RV

    def _said(self, part: Part, logits_RV: Tensor) -> Update | None:
        """What this part gives its client."""
        sequence, request = part.sequence, part.sequence.request
        if request.prompt_logprobs:
            sequence.prompt += _prompt_scores(part, logits_RV)
        if not part.ends:
            return None
        prompt = () if sequence.answer else tuple(sequence.prompt)
        if not sequence.room:  # a prompt that is only scored
            return Update(prompt=prompt, finish="length")
        token = self._choosers[sequence].choose(logits_RV[-1])
        if token in self._ends:
            return Update(prompt=prompt, finish="stop")
        said = [Scored(token)] if request.logprobs is None else scored(logits_RV[-1:], [token], request.logprobs)
        return Update(tuple(said), prompt, "length" if sequence.answer + 1 == sequence.room else None)

    def _spoke(self, sequence: Sequence) -> None:
        now = time.monotonic()
        if sequence.spoke is None:
            self._stats.first_token.add(now - sequence.arrived)
        else:
            self._stats.each_token.add(now - sequence.spoke)
        sequence.spoke = now
        self._stats.answer_tokens += 1
        self._recent.append(now)

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._choosers[sequence]
        self._stats.requests += 1


def _wanted(part: Part) -> int:
    """Rows of it whose logits are asked for."""
    if part.sequence.request.prompt_logprobs and not part.sequence.answer:
        return part.tokens
    return int(part.ends)


def _prompt_scores(part: Part, logits_RV: Tensor) -> list[Scored]:
    """Of the tokens of the prompt that follow those of this part; the first one's has no score."""
    sequence, request = part.sequence, part.sequence.request
    if sequence.answer:
        return []
    first = [Scored(sequence.ids[0])] if part.start == 0 else []
    tokens = sequence.ids[part.start + 1 : part.start + 1 + part.tokens]
    return first + scored(logits_RV[: len(tokens)], tokens, request.logprobs or 0)
