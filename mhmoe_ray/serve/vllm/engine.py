"""The engine that computes with vLLM: on a CPU, one GPU or several, tensor- or expert-parallel, on one node.

vLLM's own loop runs in the engine's thread. On a CPU vLLM's core is in this process, which spares each step the round
trip to another process; with GPUs the core is in a process of its own, so that it does not share Python's lock with the
HTTP server. Requests wait here, where clients take turns, and not in vLLM.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerBase

from mhmoe_ray.checkpoint.manifest import Manifest
from mhmoe_ray.serve.engine.request import EngineError, FinishReason, Request, Sampling, Scored, Stats, Update
from mhmoe_ray.serve.engine.scheduler import Turns
from mhmoe_ray.serve.engine.threaded import Deliver, ThreadedEngine, Ticket
from mhmoe_ray.serve.vllm.folder import FORMAT, check_fits, write_folder
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location

FIRST = Request((0,), Sampling(max_tokens=2, top_p=0.9, seed=0), logprobs=1, prompt_logprobs=True)
"""A request that uses all of vLLM's sampler, to warm it up."""
COUNT_ROUNDS = 256
"""Number of rounds after which the experts' counts are read again while the engine never rests."""


class _Asked(Ticket):
    number = ""
    """The request's id in vLLM, once it has been handed over."""
    answer = 0
    """Number of tokens of the answer so far."""
    finished = False
    """Whether vLLM has finished the request and forgotten it."""


class VllmEngine(ThreadedEngine[_Asked]):
    def __init__(
        self, checkpoint: Location, manifest: Manifest, ends: frozenset[int], known: int, spec: ServeSpec
    ) -> None:
        """Start vLLM in the engine's thread and wait until it is ready.

        Args:
            checkpoint: the checkpoint directory inside its run directory, already verified.
            manifest: the checkpoint's manifest.
            ends: tokens that end an answer and are no part of it.
            known: number of tokens that the tokenizer has.
            spec: sizes; `max_waiting` is the length of the queue.

        Raises:
            ServeError: vLLM has no layers for this model.
            EngineError: vLLM does not start; the message says why.
        """
        super().__init__(manifest.seq_len, spec.max_concurrency, spec.max_waiting)
        self._on_cpu = current_platform.is_cpu()
        check_fits(manifest.model, self._on_cpu)
        self._checkpoint, self._manifest, self._ends, self._known = checkpoint, manifest, ends, known
        self._spec = spec
        self._turns = Turns[_Asked]()
        self._running: dict[str, _Asked] = {}
        self._meter = _Meter()
        self._count_LE: list[list[int]] = []
        self._rounds = self._numbers = 0
        self._ready = Event()
        # Threads of a kernel belong to the thread that first computes: vLLM is made where it will run.
        self._thread.start()
        self._ready.wait()
        if self._broken:
            raise EngineError(f"vLLM did not start: {self.why_broken}") from self._broken

    def _run(self) -> None:
        try:
            self._vllm = self._made()
        except Exception as e:
            self._broken = e
            return
        finally:
            self._ready.set()
        try:
            super()._run()
        finally:
            self._vllm.engine_core.shutdown()

    def _made(self) -> LLMEngine:
        spec, model = self._spec, self._manifest.model
        ranks = spec.tensor_parallel
        if self._on_cpu:
            torch.set_num_threads(spec.cpus_per_replica)
            # Else it computes in a worker of its own, even a single one.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores(ranks, spec.cpus_per_replica))
        size = 2 if spec.precision == "bfloat16" else 4
        token = 2 * model.layers * max(1, model.n_kv_heads // ranks) * model.head_width * size
        room = spec.cache_tokens or spec.max_concurrency * self.seq_len
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), self._checkpoint, self._manifest, self._known)
            config = EngineArgs(
                model=folder,
                load_format=FORMAT,
                skip_tokenizer_init=True,
                dtype=spec.precision,
                max_model_len=self.seq_len + 1,
                max_num_seqs=spec.max_concurrency,
                max_logprobs=-1,
                # A block more for each request, whose last one is not full.
                kv_cache_memory_bytes=token * (max(room, self.seq_len) + 128 * (spec.max_concurrency + 1)),
                enable_prefix_caching=True,
                tensor_parallel_size=ranks,
                enable_expert_parallel=spec.expert_parallel,
                # Compiling takes half a minute at each start, and gains a fifth of the time of a step on a CPU.
                enforce_eager=self._on_cpu,
                worker_extension_cls="mhmoe_ray.serve.vllm.loader.WorkerExtension",
            ).create_engine_config()
            engine = LLMEngine(
                config,
                Executor.get_class(config),
                log_stats=True,
                stat_loggers=[lambda *_: self._meter],
                multiprocess_mode=not self._on_cpu,
            )
            # Its sampler is compiled at its first use, which no client should wait for.
            engine.add_request("first", {"prompt_token_ids": [0]}, _params(FIRST, room=2))
            while engine.has_unfinished_requests():
                engine.step()
            self._meter.steps = self._meter.tokens = 0
            engine.collective_rpc("mhmoe_count_anew")
        return engine

    def _enter(self, request: Request, room: int, deliver: Deliver) -> _Asked:
        asked = _Asked(request, room, deliver)
        self._turns.add(request.client, asked)
        return asked

    def _leave(self, ticket: _Asked) -> None:
        if not self._running.pop(ticket.number, None):
            self._turns.remove(ticket.request.client, ticket)
        elif not ticket.finished:
            self._vllm.abort_request([ticket.number])

    def _everyone(self) -> list[_Asked]:
        return [*self._running.values(), *self._turns]

    def _waiting(self) -> int:
        return len(self._turns)

    def _measure(self, stats: Stats) -> None:
        stats.cache_used, stats.steps, stats.step_tokens = self._meter.cache_used, self._meter.steps, self._meter.tokens
        stats.count_LE = self._count_LE

    def _round(self) -> bool:
        with self._wake:
            self._end_those_gone()
            while len(self._turns) and len(self._running) < self._concurrency:
                self._begin(self._turns.pop())
            if self._closed:
                return False
            if not self._running:
                self._count()
                self._rest()
                return True
        outputs = self._vllm.step()
        with self._wake:
            for output in outputs:
                if asked := self._running.get(output.request_id):
                    self._take(asked, output)
            self._rounds += 1
            if self._rounds % COUNT_ROUNDS == 0:
                self._count()
        return True

    def _count(self) -> None:
        self._count_LE = self._vllm.collective_rpc("mhmoe_counts")[0]

    def _begin(self, asked: _Asked) -> None:
        """Hand the request over to vLLM; if vLLM refuses it, fail this request alone."""
        self._numbers += 1
        asked.number = str(self._numbers)
        self._running[asked.number] = asked
        try:
            params = _params(asked.request, asked.room, self._ends)
            self._vllm.add_request(asked.number, {"prompt_token_ids": list(asked.request.prompt_ids)}, params)
        except Exception as e:  # of this request alone: an engine that is broken fails in its step or count too
            asked.finished = True
            self._fail(asked, EngineError(f"{type(e).__name__}: {e}"))

    def _take(self, asked: _Asked, output: RequestOutput) -> None:
        [answer] = output.outputs
        prompt: tuple[Scored, ...] = ()
        if not asked.begun:
            began = output.metrics.scheduled_ts if output.metrics else 0.0
            self._began(asked, max(0.0, began - asked.arrived), output.num_cached_tokens or 0)
            if asked.request.prompt_logprobs:
                prompt = _scored(asked.request.prompt_ids, output.prompt_logprobs, asked.request.logprobs)
        tokens = _scored(answer.token_ids, answer.logprobs, asked.request.logprobs)
        if tokens and tokens[-1].token in self._ends:
            tokens = tokens[:-1]
        tokens = tokens[: asked.room - asked.answer]  # none where a prompt is only scored
        asked.answer += len(tokens)
        for _ in tokens:
            self._spoke(asked)
        finish: FinishReason | None = None
        if output.finished:
            finish = "stop" if answer.finish_reason == "stop" and asked.room else "length"
        if tokens or prompt or finish:
            asked.deliver(Update(tokens, prompt, finish))
        if finish:
            asked.finished = True
            self._end(asked)


class _Meter(StatLoggerBase):
    """Collects the statistics that vLLM reports after each of its steps."""

    def __init__(self) -> None:
        self.cache_used, self.steps, self.tokens = 0.0, 0, 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.cache_used = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.steps += 1
            self.tokens += iteration_stats.num_generation_tokens + iteration_stats.num_prompt_tokens

    def log_engine_initialized(self) -> None:
        pass


def _params(request: Request, room: int, ends: frozenset[int] = frozenset()) -> SamplingParams:
    sampling = request.sampling
    return SamplingParams(
        max_tokens=max(room, 1),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=None if sampling.seed is None else sampling.seed % 2**63,
        logprobs=request.logprobs,
        prompt_logprobs=(request.logprobs or 0) if request.prompt_logprobs else None,
        stop_token_ids=sorted(ends),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _scored(
    tokens: Sequence[int], found: "Sequence[dict[int, Any] | None] | None", alternatives: int | None
) -> tuple[Scored, ...]:
    """Return each token with its score and the `alternatives` most likely tokens; vLLM always reports the token itself
    too."""
    if found is None:
        return tuple(map(Scored, tokens))
    scores = []
    for token, here in zip(tokens, found, strict=True):
        if here is None:  # the first one of a prompt
            scores.append(Scored(token))
            continue
        best = sorted((lp.rank, other, lp.logprob) for other, lp in here.items() if lp.rank <= (alternatives or 0))
        scores.append(Scored(token, here[token].logprob, tuple((other, logprob) for _, other, logprob in best)))
    return tuple(scores)


def _cores(ranks: int, cpus: int) -> str:
    """Return the cores of each rank in the form of vLLM's VLLM_CPU_OMP_THREADS_BIND; a single rank is not bound."""
    if ranks == 1:
        return "nobind"
    allowed = sorted(os.sched_getaffinity(0))
    each = max(1, min(cpus, len(allowed)) // ranks)
    return "|".join(",".join(str(allowed[(r * each + i) % len(allowed)]) for i in range(each)) for r in range(ranks))
