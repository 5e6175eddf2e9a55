"""The engine that computes with vLLM: on a CPU, one GPU or several, tensor- or expert-parallel, on one node.

vLLM's own loop runs in the engine's thread. On a CPU vLLM's core is in this process, which saves each step a round
trip; with GPUs it is in another process, so that it does not share Python's lock with the HTTP server. Requests wait in
this engine's queue, where clients take turns, and in vLLM only if they may run (`scheduler.py`).
"""

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from threading import Event
from typing import Any

import torch
from vllm import SamplingParams as VllmSamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerBase

from mhmoe_ray.checkpoint.manifest import CheckpointManifest, stored_manifest
from mhmoe_ray.serving.engine.fair_queue import FairQueue, slots_of_client
from mhmoe_ray.serving.engine.request import (
    AnswerUpdate,
    EngineError,
    FinishReason,
    Request,
    ScoredToken,
    ServedWeights,
    Stats,
)
from mhmoe_ray.serving.engine.threaded import Deliver, RequestState, ThreadedEngine
from mhmoe_ray.serving.sampling import SamplingParams
from mhmoe_ray.serving.vllm.adapters import VllmAdapter, check_adapter, lora_options
from mhmoe_ray.serving.vllm.folder import LOAD_FORMAT, check_fits, engine_options, write_folder
from mhmoe_ray.serving.vllm.options import TOOL_PARSER
from mhmoe_ray.serving.vllm.scheduler import PAUSED_FACTOR, SCHEDULERS
from mhmoe_ray.serving.vllm.structures import VllmStructures, structured_params
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location

WARMUP_REQUEST = Request((0,), SamplingParams(max_tokens=2, top_p=0.9, seed=0, logprobs=1), prompt_logprobs=True)
"""Request for the warm-up, in which vLLM compiles its sampler before clients come."""
# To read how often each expert was chosen, the engine calls all workers, so it must do this rarely.
ROUNDS_PER_COUNT = 256
"""Number of steps of a busy engine between two readings of each expert's routes."""


class _VllmRequest(RequestState):
    adapter: VllmAdapter | None = None
    vllm_id = ""
    """Id of the request in vLLM; empty while it waits."""
    answer_tokens = 0
    is_finished = False
    """Whether vLLM has finished and removed the request."""


class VllmEngine(ThreadedEngine[_VllmRequest, VllmAdapter]):
    """An engine of a decoder that computes with vLLM."""

    structures: VllmStructures | None = None

    def __init__(
        self,
        checkpoint: Location,
        manifest: CheckpointManifest,
        stop_token_ids: frozenset[int],
        tokenizer_size: int,
        spec: ServeSpec,
    ) -> None:
        """Start vLLM in the engine's thread, with a verified checkpoint, and wait until it is ready.

        A model that vLLM cannot compute or shard is a ServeError, and a failing start an EngineError.
        """
        super().__init__(manifest.seq_len, stop_token_ids, spec)
        self._on_cpu = current_platform.is_cpu()
        check_fits(manifest.model, self._on_cpu, spec.tensor_parallel, spec.expert_parallel)
        self._checkpoint, self._manifest, self._tokenizer_size = checkpoint, manifest, tokenizer_size
        self._waiting_queue = FairQueue[_VllmRequest]()
        self._running: dict[str, _VllmRequest] = {}
        self._loaded_adapters: set[VllmAdapter] = set()
        self._stat_logger = _StatLogger()
        self._count_LE: list[list[int]] = []
        self._round_count = self._request_count = 0
        self._ready = Event()
        # Threads of CPU kernels belong to the thread that computes first, so vLLM is created in the engine's thread.
        self._thread.start()
        self._ready.wait()
        if self._failure:
            raise EngineError(f"vLLM did not start: {self.failure_reason}") from self._failure

    def _run(self) -> None:
        # `__init__` waits in another thread until vLLM is ready, and raises the error if vLLM does not start.
        try:
            self._vllm = self._create_vllm()
        except Exception as e:
            self._failure = e
            return
        finally:
            self._ready.set()
        try:
            super()._run()
        finally:
            self._vllm.engine_core.shutdown()

    def _create_vllm(self) -> LLMEngine:
        """Start vLLM with the model, run a warm-up request, reset the statistics, and return vLLM's engine."""
        spec, model = self._spec, self._manifest.model
        ranks = spec.tensor_parallel
        if self._on_cpu:
            torch.set_num_threads(spec.cpus_per_replica)
            # By default vLLM computes in another process even with a single worker.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _core_binding(ranks, spec.cpus_per_replica))
        # `token_bytes` is the size of the keys and values of one token on each rank.
        size = 2 if spec.precision == "bfloat16" else 4
        token_bytes = 2 * model.layers * max(1, model.n_kv_heads // ranks) * model.head_width * size
        cache_tokens = spec.cache_tokens or spec.max_concurrency * self.seq_len
        with tempfile.TemporaryDirectory() as model_folder:
            write_folder(Path(model_folder), self._checkpoint, self._manifest, self._tokenizer_size)
            own_options = dict(
                model=model_folder,
                load_format=LOAD_FORMAT,
                dtype=spec.precision,
                # A prompt of full length can only be scored, but vLLM needs room for a token after it.
                max_model_len=self.seq_len + 1,
                max_num_seqs=PAUSED_FACTOR * spec.max_concurrency,
                max_logprobs=-1,
                # Each request needs one more block (128 tokens on a CPU), because its last block is not full. Another
                # request of full length is for clients that come while one client's requests fill the cache.
                kv_cache_memory_bytes=token_bytes
                * (max(cache_tokens, self.seq_len) + self.seq_len + 128 * (PAUSED_FACTOR * spec.max_concurrency + 1)),
                enable_prefix_caching=True,
                tensor_parallel_size=ranks,
                enable_expert_parallel=spec.expert_parallel,
                # Compiling takes half a minute at each start, and gains a fifth of the time of a step on a CPU.
                enforce_eager=self._on_cpu,
                worker_extension_cls="mhmoe_ray.serving.vllm.loader.WorkerExtension",
                **lora_options(model, spec, self._on_cpu),
                **engine_options(model, self._on_cpu, ranks, {field.name for field in fields(EngineArgs)}),
            )
            options = {name: value for name, value in spec.vllm.items() if name != TOOL_PARSER}
            config = EngineArgs(**{**own_options, **options}).create_engine_config()
            config.scheduler_config.scheduler_cls = SCHEDULERS[config.scheduler_config.get_scheduler_cls()]
            engine = LLMEngine(
                config,
                Executor.get_class(config),
                log_stats=True,
                stat_loggers=[lambda *_: self._stat_logger],
                multiprocess_mode=not self._on_cpu,
            )
            self.structures = VllmStructures(config, engine.get_tokenizer(), spec.vllm.get(TOOL_PARSER))
            # vLLM compiles its sampler at the first use, which no client should wait for.
            engine.add_request("first", {"prompt_token_ids": [0]}, _vllm_params(WARMUP_REQUEST, max_new_tokens=2))
            while engine.has_unfinished_requests():
                engine.step()
            # Statistics must include neither the warm-up request nor the trial runs of vLLM itself.
            self._stat_logger.steps = self._stat_logger.tokens = 0
            engine.collective_rpc("mhmoe_reset_counts")
        return engine

    def _add_request(self, request: Request, max_new_tokens: int, deliver: Deliver) -> _VllmRequest:
        state = _VllmRequest(request, max_new_tokens, deliver)
        state.adapter = self._adapter_of(request)
        self._waiting_queue.add(request.client, state)
        return state

    def _load_adapter(self, name: str, checkpoint: Location, weights: ServedWeights) -> VllmAdapter:
        manifest = stored_manifest(checkpoint)
        check_adapter(name, manifest, self._spec)
        return VllmAdapter.read(checkpoint, manifest)

    def _remove_request(self, state: _VllmRequest) -> None:
        if not self._running.pop(state.vllm_id, None):
            self._waiting_queue.remove(state.request.client, state)
        elif not state.is_finished:
            self._vllm.abort_request([state.vllm_id])

    def _all_requests(self) -> list[_VllmRequest]:
        return [*self._running.values(), *self._waiting_queue]

    def _count_waiting(self) -> int:
        return len(self._waiting_queue)

    def _fill_stats(self, stats: Stats) -> None:
        stats.cache_used, stats.steps, stats.step_tokens = (
            self._stat_logger.cache_used,
            self._stat_logger.steps,
            self._stat_logger.tokens,
        )
        stats.count_LE = self._count_LE

    def _run_round(self) -> bool:
        with self._condition:
            self._end_abandoned_requests()
            self._start_requests()
            if self._is_closed:
                return False
            # How often each expert was chosen is read before the thread waits for requests, so that the counts are
            # complete while the engine is idle.
            if not self._running:
                self._read_expert_counts()
                self._wait_for_work()
                return True
        outputs = self._vllm.step()
        with self._condition:
            for output in outputs:
                if state := self._running.get(output.request_id):
                    self._handle_output(state, output)
            self._round_count += 1
            if self._round_count % ROUNDS_PER_COUNT == 0:
                self._read_expert_counts()
        return True

    def _read_expert_counts(self) -> None:
        """Read from vLLM's first worker how many routes each expert of each layer got."""
        self._count_LE = self._vllm.collective_rpc("mhmoe_counts")[0]

    def _start_requests(self) -> None:
        """Pass waiting requests to vLLM: as many as it computes at a time, or each client's share of these."""
        limit, running_counts = self._spec.max_concurrency, Counter(s.request.client for s in self._running.values())
        client_count = len(running_counts.keys() | self._waiting_queue.clients)
        startable = set(self._waiting_queue.clients)
        while startable and len(self._running) < PAUSED_FACTOR * limit:
            client = self._waiting_queue.turns.next_client(startable)
            is_full = len(self._running) >= limit and running_counts[client] >= slots_of_client(limit, client_count)
            next_state = self._waiting_queue.peek(client)
            if is_full or (next_state and not self._has_lora_slot(next_state.adapter)):
                startable.remove(client)
                continue
            state = self._waiting_queue.pop(client)
            running_counts[client] += 1
            self._waiting_queue.turns.charge(client, len(state.request.prompt_ids))
            self._start_request(state)
            startable &= set(self._waiting_queue.clients)

    def _has_lora_slot(self, adapter: VllmAdapter | None) -> bool:
        """Return whether vLLM has an adapter, or a place for it. Adapters of no running request leave their places."""
        if adapter is None or adapter in self._loaded_adapters or len(self._loaded_adapters) < self._spec.max_adapters:
            return True
        idle_adapters = self._loaded_adapters - {state.adapter for state in self._running.values()}
        for idle_adapter in idle_adapters:
            self._vllm.remove_lora(idle_adapter.id)
        self._loaded_adapters -= idle_adapters
        return bool(idle_adapters)

    def _lora_request(self, adapter: VllmAdapter) -> LoRARequest:
        """Return how a request names an adapter to vLLM, which loads it before its first request."""
        if adapter not in self._loaded_adapters:
            with tempfile.TemporaryDirectory() as folder:
                adapter.write(Path(folder))
                self._vllm.add_lora(LoRARequest(str(adapter.id), adapter.id, folder))
            self._loaded_adapters.add(adapter)
        # vLLM does not read the folder again, and hashes this text with the tokens of cached blocks.
        return LoRARequest(str(adapter.id), adapter.id, "loaded")

    def _start_request(self, state: _VllmRequest) -> None:
        """Pass a request to vLLM; if vLLM refuses it, fail this request alone."""
        self._request_count += 1
        state.vllm_id = str(self._request_count)
        self._running[state.vllm_id] = state
        try:
            params = _vllm_params(state.request, state.max_new_tokens, self._end_tokens(state.request))
            if self.structures and state.request.structure and "json" in state.request.structure.kind:
                params.logit_bias = {**(params.logit_bias or {}), **self.structures.json_biases}
            prompt = {"prompt_token_ids": list(state.request.prompt_ids)}
            lora_request = self._lora_request(state.adapter) if state.adapter else None
            self._vllm.add_request(state.vllm_id, prompt, params, lora_request=lora_request)
        # vLLM refuses parameters with various exceptions, so all are caught. If vLLM itself is broken, its next step
        # fails too.
        except Exception as e:
            state.is_finished = True
            self._fail_request(state, EngineError(f"{type(e).__name__}: {e}"))

    def _handle_output(self, state: _VllmRequest, output: RequestOutput) -> None:
        """Deliver the tokens and scores of a step to a request, and end a finished one."""
        [completion], alternatives = output.outputs, state.request.sampling_params.logprobs
        prompt_scores: tuple[ScoredToken, ...] = ()
        if not state.is_running:
            start_time = output.metrics.scheduled_ts if output.metrics else 0.0
            self._record_start(state, max(0.0, start_time - state.arrival_time), output.num_cached_tokens or 0)
            if state.request.prompt_logprobs:
                prompt_scores = _score_tokens(state.request.prompt_ids, output.prompt_logprobs, alternatives)
        tokens = _score_tokens(completion.token_ids, completion.logprobs, alternatives)
        if tokens and tokens[-1].token in self._end_tokens(state.request):
            tokens = tokens[:-1]
        # vLLM computes at least one token, but a request that only scores its prompt gets none.
        tokens = tokens[: state.max_new_tokens - state.answer_tokens]
        state.answer_tokens += len(tokens)
        self._waiting_queue.turns.charge(state.request.client, len(tokens))
        for _ in tokens:
            self._record_token(state)
        finish_reason: FinishReason | None = None
        if completion.finish_reason == "error":
            state.is_finished = True
            self._fail_request(state, EngineError("vLLM could not compile the structure of the answer"))
            return
        if output.finished:
            finish_reason = "stop" if completion.finish_reason == "stop" and state.max_new_tokens else "length"
        if tokens or prompt_scores or finish_reason:
            state.deliver(AnswerUpdate(tokens, prompt_scores, finish_reason))
        if finish_reason:
            state.is_finished = True
            self._end_request(state)


class _StatLogger(StatLoggerBase):
    """Collector of the statistics that vLLM reports after each of its steps."""

    def __init__(self) -> None:
        self.cache_used, self.steps, self.tokens = 0.0, 0, 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.cache_used = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.steps += 1
            self.tokens += iteration_stats.num_generation_tokens + iteration_stats.num_prompt_tokens

    def log_engine_initialized(self) -> None:
        """Do nothing. vLLM requires this method."""
        pass


def _vllm_params(request: Request, max_new_tokens: int, end_tokens: frozenset[int] = frozenset()) -> VllmSamplingParams:
    params = request.sampling_params
    return VllmSamplingParams(
        # vLLM generates at least one token. If the request only scores its prompt, this token is removed again.
        max_tokens=max(max_new_tokens, 1),
        # Before `min_tokens`, vLLM also forbids the tokenizer's end, which is an ordinary token if it ends nothing.
        min_tokens=min(params.min_tokens, max_new_tokens) if end_tokens else 0,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias or None,
        seed=None if params.seed is None else params.seed % 2**63,
        logprobs=params.logprobs,
        prompt_logprobs=(params.logprobs or 0) if request.prompt_logprobs else None,
        stop_token_ids=sorted(end_tokens),
        ignore_eos=True,
        detokenize=False,
        extra_args={"client": request.client},
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=structured_params(request.structure) if request.structure else None,
    )


def _score_tokens(
    tokens: Sequence[int], logprobs: "Sequence[dict[int, Any] | None] | None", alternatives: int | None
) -> tuple[ScoredToken, ...]:
    """Return each token with its score from vLLM's log-probabilities by token, if the request asks for scores."""
    if logprobs is None:
        return tuple(map(ScoredToken, tokens))
    scores = []
    for token, token_logprobs in zip(tokens, logprobs, strict=True):
        # The first token of a prompt has no score.
        if token_logprobs is None:
            scores.append(ScoredToken(token))
            continue
        # vLLM adds the token itself to the alternatives, whatever its rank.
        best = sorted(
            (lp.rank, other_token, lp.logprob)
            for other_token, lp in token_logprobs.items()
            if lp.rank <= (alternatives or 0)
        )
        scores.append(
            ScoredToken(
                token, token_logprobs[token].logprob, tuple((other_token, logprob) for _, other_token, logprob in best)
            )
        )
    return tuple(scores)


def _core_binding(ranks: int, cpus: int) -> str:
    """Return a value for VLLM_CPU_OMP_THREADS_BIND, with which vLLM binds each rank to its cores.

    The ranks share `cpus` cores of those that this process may use. A single rank is not bound.
    """
    if ranks == 1:
        return "nobind"
    allowed_cores = sorted(os.sched_getaffinity(0))
    cores_per_rank = max(1, min(cpus, len(allowed_cores)) // ranks)
    return "|".join(
        ",".join(str(allowed_cores[(r * cores_per_rank + i) % len(allowed_cores)]) for i in range(cores_per_rank))
        for r in range(ranks)
    )
