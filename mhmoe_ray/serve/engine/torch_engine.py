"""The engine for this project's own decoder: one process, a CPU or one GPU.

Each round is one step of the model for all running requests together. On a CPU an answer is the same to the last bit
whatever else is in the batch (`paged_cache.py`).
"""

import time

import torch
from torch import Tensor

from mhmoe_kernels import packed
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import matrices
from mhmoe_ray.serve.engine.block_pool import BlockPool, blocks_for
from mhmoe_ray.serve.engine.packed_model import pack
from mhmoe_ray.serve.engine.paged_cache import PagedCache, PagedStep, Span
from mhmoe_ray.serve.engine.request import EngineError, Request, Scored, Stats, Update
from mhmoe_ray.serve.engine.sampler import Chooser, scored
from mhmoe_ray.serve.engine.scheduler import Part, Scheduler, Sequence
from mhmoe_ray.serve.engine.threaded import Deliver, ThreadedEngine
from mhmoe_ray.spec import ServeSpec

BUDGET = {"cpu": 256, "cuda": 2048}
"""Approximate number of prompt tokens in one step, by type of device."""


class TorchEngine(ThreadedEngine[Sequence]):
    def __init__(
        self,
        model: Decoder,
        dtype: torch.dtype,
        ends: frozenset[int],
        known: int,
        seq_len: int,
        *,
        concurrency: int,
        queue: int,
        threads: int,
        cache_tokens: int | None = None,
    ) -> None:
        """Start the engine and its thread.

        Args:
            model: the model with all experts, in evaluation mode, on its device.
            dtype: type of its matrices, and of keys and values.
            ends: tokens that end an answer and are no part of it.
            known: number of tokens that the tokenizer has; the model may have more rows, which have no text.
            seq_len: largest number of tokens of prompt and answer together.
            concurrency: number of requests that are computed at a time.
            queue: number of requests that may wait.
            threads: number of threads that compute on a CPU. If other threads of the process have computed on several
                threads before, these synchronise more slowly, because libgomp sees more threads than CPUs.
            cache_tokens: number of tokens whose keys and values the cache has room for, at least one request of full
                length; by default enough that none of `concurrency` requests waits for room.
        """
        super().__init__(seq_len, concurrency, queue)
        self._model, self._ends, self._known = model, ends, known
        self._device = model.embedding.weight.device
        blocks = blocks_for(cache_tokens) if cache_tokens else concurrency * blocks_for(seq_len)
        # A single request of full length must fit, or it would wait for ever.
        self._pool = BlockPool(max(blocks, blocks_for(seq_len)))
        self._bfloat16 = dtype == torch.bfloat16
        self._cache = PagedCache(model.spec, self._pool.size, dtype, self._device)
        self._scheduler = Scheduler(self._pool, concurrency, BUDGET[self._device.type])
        self._choosers: dict[Sequence, Chooser] = {}
        moe = model.spec.moe
        self._count_LE = torch.zeros(model.spec.moe_layers, moe.experts if moe else 0, dtype=torch.long)
        self._threads = threads
        self._thread.start()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        super()._run()

    def _enter(self, request: Request, room: int, deliver: Deliver) -> Sequence:
        sequence = Sequence(request, room, deliver)
        self._choosers[sequence] = Chooser(request.sampling)
        self._scheduler.add(sequence)
        return sequence

    def _leave(self, ticket: Sequence) -> None:
        self._scheduler.remove(ticket)
        del self._choosers[ticket]

    def _everyone(self) -> list[Sequence]:
        return self._scheduler.everyone()

    def _waiting(self) -> int:
        return self._scheduler.waiting

    def _measure(self, stats: Stats) -> None:
        stats.cache_used = 1 - self._pool.free / self._pool.size
        stats.count_LE = self._count_LE.tolist()

    def _round(self) -> bool:
        parts = self._next()
        if parts:
            self._step(parts)
        return bool(parts)

    def _next(self) -> list[Part]:
        """Wait until the scheduler has parts for a step and return them; return none once the engine is closed."""
        with self._wake:
            while not self._closed:
                self._end_those_gone()
                if parts := self._scheduler.next():
                    for sequence in {part.sequence for part in parts if not part.sequence.begun}:
                        self._began(sequence, time.monotonic() - sequence.arrived, sequence.computed)
                    return parts
                self._rest()
            return []

    @torch.inference_mode()
    def _step(self, parts: list[Part]) -> None:
        logits_RV = self._computed(parts)
        best = logits_RV.argmax(-1).tolist()
        at = 0
        for part in parts:
            sequence, rows = part.sequence, _wanted(part)
            at += rows
            if sequence not in self._choosers:  # an earlier part of it has failed
                continue
            try:
                update = self._said(part, logits_RV[at - rows : at], best[at - 1] if rows else 0)
            except Exception as e:  # of this request alone
                with self._wake:
                    self._fail(sequence, EngineError(f"{type(e).__name__}: {e}"))
                continue
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
        """Run the model on the parts and return the logits of all wanted rows, float32, in CPU memory."""
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

    def _said(self, part: Part, logits_RV: Tensor, best: int) -> Update | None:
        """Return what the client gets from a part, if anything; `best` is the most likely token after the part."""
        sequence, request = part.sequence, part.sequence.request
        if request.prompt_logprobs:
            sequence.prompt += _prompt_scores(part, logits_RV)
        if not part.ends:
            return None
        prompt = () if sequence.answer else tuple(sequence.prompt)
        if not sequence.room:  # a prompt that is only scored
            return Update(prompt=prompt, finish="length")
        token = self._choosers[sequence].choose(logits_RV[-1], best)
        if token in self._ends:
            return Update(prompt=prompt, finish="stop")
        said = [Scored(token)] if request.logprobs is None else scored(logits_RV[-1:], [token], request.logprobs)
        return Update(tuple(said), prompt, "length" if sequence.answer + 1 == sequence.room else None)


def _wanted(part: Part) -> int:
    """Return the number of rows of the part whose logits are wanted."""
    if part.sequence.request.prompt_logprobs and not part.sequence.answer:
        return part.tokens
    return int(part.ends)


def _prompt_scores(part: Part, logits_RV: Tensor) -> list[Scored]:
    """Return the scores of the prompt tokens that this part predicts, those one position after its own.

    The first token of the prompt has no score; it comes first in the result of the first part.
    """
    sequence, request = part.sequence, part.sequence.request
    if sequence.answer:
        return []
    first = [Scored(sequence.ids[0])] if part.start == 0 else []
    tokens = sequence.ids[part.start + 1 : part.start + 1 + part.tokens]
    return first + scored(logits_RV[: len(tokens)], tokens, request.logprobs or 0)


def own_engine(model: Decoder, ends: frozenset[int], known: int, seq_len: int, spec: ServeSpec) -> TorchEngine:
    """Return a `TorchEngine` for a model in memory.

    Args:
        model: the model with all experts, in evaluation mode, float32; the engine owns it from now on.
        ends: tokens that end an answer.
        known: number of tokens that may be chosen, counted from id 0.
        seq_len: largest number of tokens of prompt and answer together.
        spec: precision, and numbers of requests.
    """
    dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    if dtype == torch.bfloat16:
        _halve(model)
    if spec.gpus_per_replica:
        model.to("cuda")  # after that: whole, it may not fit
    if model.embedding.weight.device.type == "cpu":
        suit_to_cpu(model, dtype)
    return TorchEngine(
        model,
        dtype,
        ends,
        known,
        seq_len,
        concurrency=spec.max_concurrency,
        queue=spec.max_waiting,
        threads=spec.cpus_per_replica,
        cache_tokens=spec.cache_tokens,
    )


def suit_to_cpu(model: Decoder, dtype: torch.dtype) -> None:
    """Replace a model's matrix products, in place, by products in which the result of a row depends on no other row.

    Args:
        model: the model with all experts, on a CPU.
        dtype: type of its matrices.
    """
    if packed.why_not(dtype) is None:
        pack(model)
    else:
        for layer in model.moe_layers():
            layer.experts.kernel = "padded"


def _halve(model: Decoder) -> None:
    """Convert the weights of matrix products to bfloat16, in place; those of routers and norms stay float32."""
    for name in matrices(model):
        if ".router." not in name:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(torch.bfloat16)
