"""The engine for this project's own decoder, in one process, on a CPU or one GPU.

Each round is one step of the model for all running requests. On a CPU an answer is bit-identical in any batch
(`paged_cache.py`).
"""

import time
from itertools import groupby

import torch
from torch import Tensor

from mhmoe_kernels import packed
from mhmoe_kernels.packed import PackedMatrix, PaddedMatrix
from mhmoe_ray.checkpoint.load import WeightsReader, load_verified_model
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import matrix_names
from mhmoe_ray.serving.engine.block_pool import BlockPool, count_blocks
from mhmoe_ray.serving.engine.packed_model import PackedModel, ServedAdapter
from mhmoe_ray.serving.engine.paged_cache import PagedCache, PagedChunk, PagedStep
from mhmoe_ray.serving.engine.request import (
    AnswerUpdate,
    EngineError,
    Request,
    ScoredToken,
    ServedWeights,
    Stats,
    TokenRoutes,
)
from mhmoe_ray.serving.engine.sampler import Sampler, score_tokens
from mhmoe_ray.serving.engine.scheduler import Scheduler, Sequence, TokenChunk
from mhmoe_ray.serving.engine.threaded import Deliver, ThreadedEngine
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location

# A large step uses a device better, but running answers wait for it. A GPU needs more tokens than a CPU to be busy.
PREFILL_BUDGET = {"cpu": 256, "cuda": 2048}
"""Approximate number of prompt tokens in one step, by type of device."""


class TorchEngine(ThreadedEngine[Sequence, ServedAdapter]):
    """An engine with a scheduler, a paged KV cache, and a sampler for each request."""

    def __init__(
        self,
        model: Decoder,
        stop_token_ids: frozenset[int],
        tokenizer_size: int,
        seq_len: int,
        spec: ServeSpec,
        packed_model: PackedModel | None = None,
    ) -> None:
        """Start the engine and its thread, with a model that has all experts, in evaluation mode, on its device.

        Adapters need its `packed_model`.

        The cache has the data type of the matrices, and fits `max_concurrency` requests of full length by default, and
        always one.

        The threads on a CPU synchronise more slowly if another thread of the process has started its own team of OpenMP
        threads before: libgomp then sees more threads than CPUs.
        """
        super().__init__(seq_len, stop_token_ids, spec)
        self._model, self._tokenizer_size, self._packed_model = model, tokenizer_size, packed_model
        self._device = model.embedding.weight.device
        cached_tokens, full_blocks = spec.cache_tokens, count_blocks(seq_len)
        block_count = count_blocks(cached_tokens) if cached_tokens else spec.max_concurrency * full_blocks
        # A single request of full length must fit, or it would wait without end.
        # Another one is for clients without running requests (`Scheduler`).
        self._pool = BlockPool(max(block_count, full_blocks) + full_blocks)
        self._cache = PagedCache(model.spec, self._pool.size, _matrix_type(spec), self._device)
        self._scheduler = Scheduler(self._pool, spec.max_concurrency, PREFILL_BUDGET[self._device.type], seq_len)
        self._samplers: dict[Sequence, Sampler] = {}
        moe, self.returns_routes = model.spec.moe, model.spec.moe_layers > 0
        self._count_LE = torch.zeros(model.spec.moe_layers, moe.experts if moe else 0, dtype=torch.long)
        self._thread.start()

    def _run(self) -> None:
        # torch keeps this number for each calling thread, so it is set in the thread that computes.
        torch.set_num_threads(self._spec.cpus_per_replica)
        super()._run()

    def _add_request(self, request: Request, max_new_tokens: int, deliver: Deliver) -> Sequence:
        sequence = Sequence(request, max_new_tokens, deliver, self._adapter_of(request))
        end_tokens = sorted(self._end_tokens(request))
        self._samplers[sequence] = Sampler(request.sampling_params, request.prompt_ids, end_tokens)
        self._scheduler.add(sequence)
        return sequence

    def _remove_request(self, state: Sequence) -> None:
        self._scheduler.remove(state)
        del self._samplers[state]

    def _load_adapter(self, name: str, checkpoint: Location, weights: ServedWeights) -> ServedAdapter:
        assert self._packed_model is not None, "serve.max_adapters is checked before"
        return self._packed_model.pack_adapter(bytes.fromhex(weights.digest), WeightsReader(checkpoint).adapters())

    def _all_requests(self) -> list[Sequence]:
        return self._scheduler.all_sequences()

    def _count_waiting(self) -> int:
        return self._scheduler.waiting_count

    def _fill_stats(self, stats: Stats) -> None:
        stats.cache_used = 1 - self._pool.free_count / self._pool.size
        stats.count_LE = self._count_LE.tolist()

    def _run_round(self) -> bool:
        chunks = self._next_chunks()
        if chunks:
            self._run_step(chunks)
        return bool(chunks)

    def _next_chunks(self) -> list[TokenChunk]:
        """Wait for chunks of tokens from the scheduler, and return them; none once the engine is closed."""
        with self._condition:
            while not self._is_closed:
                self._end_abandoned_requests()
                if chunks := self._scheduler.schedule():
                    # The chunks of an adapter are neighbours, so that its products are computed once for all.
                    chunks.sort(key=lambda chunk: chunk.sequence.root_hash)
                    for sequence in {chunk.sequence for chunk in chunks if not chunk.sequence.is_running}:
                        self._record_start(sequence, time.monotonic() - sequence.arrival_time, sequence.computed_tokens)
                    return chunks
                self._wait_for_work()
            return []

    @torch.inference_mode()
    def _run_step(self, chunks: list[TokenChunk]) -> None:
        """Run the model on the chunks, sample the next tokens, and queue the updates for delivery.

        A request whose next token cannot be sampled ends alone with an error.
        """
        logits_RV, expert_LTK = self._compute_logits(chunks)
        best_tokens = logits_RV.argmax(-1).tolist()
        row_end = token_end = 0
        for chunk in chunks:
            sequence, row_count = chunk.sequence, _count_logits(chunk)
            row_end, token_end = row_end + row_count, token_end + chunk.length
            if sequence.request.return_routes:
                token_ids = sequence.token_ids[chunk.start : chunk.start + chunk.length]
                experts = expert_LTK[:, token_end - chunk.length : token_end].transpose(0, 1).tolist()
                sequence.routes += map(TokenRoutes, token_ids, experts)
            # The request has ended already if an earlier chunk of its sequence failed in this step.
            if sequence not in self._samplers:
                continue
            try:
                update = self._build_update(
                    chunk, logits_RV[row_end - row_count : row_end], best_tokens[row_end - 1] if row_count else 0
                )
            # An error here comes from the request's own values, such as a bias for an unknown token, so other requests
            # go on.
            except Exception as e:
                with self._condition:
                    self._fail_request(sequence, EngineError(f"{type(e).__name__}: {e}"))
                continue
            with self._condition:
                self._scheduler.record_computed(chunk)
                if update and update.tokens:
                    self._record_token(sequence)
                    sequence.token_ids.append(update.tokens[0].token)
                if update and update.finish_reason:
                    self._end_request(sequence)
            if update:
                sequence.deliver(update)

    def _compute_logits(self, chunks: list[TokenChunk]) -> tuple[Tensor, Tensor]:
        """Return the logits that are needed, for ids with a token, and the experts LTK of all tokens, in CPU memory.

        Logits are float32. Experts are empty if no request needs them.
        """
        paged_chunks = [PagedChunk(p.sequence.block_ids, p.start, p.length, _count_logits(p)) for p in chunks]
        step = PagedStep(self._cache, paged_chunks)
        token_1T = torch.zeros(1, step.padded_count, dtype=torch.long)
        token_ids = [t for p in chunks for t in p.sequence.token_ids[p.start : p.start + p.length]]
        token_1T[0, : step.token_count] = torch.tensor(token_ids)
        if self._packed_model is not None:
            chunks_by_adapter = groupby(chunks, lambda chunk: chunk.sequence.adapter)
            groups = [(adapter, sum(chunk.length for chunk in group)) for adapter, group in chunks_by_adapter]
            self._packed_model.rows.set([*groups, (None, step.padded_count - step.token_count)])
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._spec.precision == "bfloat16"):
            output = self._model(token_1T.to(self._device), step)
        for count_E, routing in zip(self._count_LE, output.routing, strict=True):
            # A row is a sub-token, and each token has the same number of rows. The rows of the padding are last, so the
            # first `row_count` rows are those of the requests.
            row_count = len(routing.expert_NK) // step.padded_count * step.token_count
            count_E += torch.bincount(routing.expert_NK[:row_count].flatten().cpu(), minlength=len(count_E))
        self._stats.steps += 1
        self._stats.step_tokens += step.token_count
        logits_RV: Tensor = output.logits_BTV[0, : step.logit_count, : self._tokenizer_size].float().cpu()
        expert_LTK = torch.empty(0)
        if any(chunk.sequence.request.return_routes for chunk in chunks):
            expert_LTK = torch.stack(
                [routing.expert_NK.view(step.padded_count, -1) for routing in output.routing]
            ).cpu()
        return logits_RV, expert_LTK

    def _build_update(self, chunk: TokenChunk, logits_RV: Tensor, best_token: int) -> AnswerUpdate | None:
        """Sample the token that follows a chunk, and return the update; None if the prompt has further chunks.

        Scores of the prompt are collected until its last chunk, which `best_token` is the likeliest to follow.
        """
        sequence, request = chunk.sequence, chunk.sequence.request
        if request.prompt_logprobs:
            sequence.prompt_scores += _score_prompt(chunk, logits_RV)
        if not chunk.is_last:
            return None
        prompt_scores = () if sequence.answer_tokens else tuple(sequence.prompt_scores)
        routes, sequence.routes = tuple(sequence.routes), []
        # A request without new tokens only scores its prompt.
        if not sequence.max_new_tokens:
            return AnswerUpdate(prompt_scores=prompt_scores, finish_reason="length", routes=routes)
        token = self._samplers[sequence].sample(logits_RV[-1], best_token)
        if token in self._end_tokens(request):
            return AnswerUpdate(prompt_scores=prompt_scores, finish_reason="stop", routes=routes)
        scored_tokens = (
            [ScoredToken(token)]
            if request.sampling_params.logprobs is None
            else score_tokens(logits_RV[-1:], [token], request.sampling_params.logprobs)
        )
        return AnswerUpdate(
            tuple(scored_tokens),
            prompt_scores,
            "length" if sequence.answer_tokens + 1 == sequence.max_new_tokens else None,
            routes,
        )


def _count_logits(chunk: TokenChunk) -> int:
    """Return the number of tokens at the end of a chunk whose logits are needed."""
    if chunk.sequence.request.prompt_logprobs and not chunk.sequence.answer_tokens:
        return chunk.length
    return int(chunk.is_last)


def _score_prompt(chunk: TokenChunk, logits_RV: Tensor) -> list[ScoredToken]:
    """Return the scores of the tokens that follow those of a prompt's chunk; the prompt's first token has none."""
    sequence, request = chunk.sequence, chunk.sequence.request
    if sequence.answer_tokens:
        return []
    scores = [ScoredToken(sequence.token_ids[0])] if chunk.start == 0 else []
    token_ids = sequence.token_ids[chunk.start + 1 : chunk.start + 1 + chunk.length]
    return scores + score_tokens(logits_RV[: len(token_ids)], token_ids, request.sampling_params.logprobs or 0)


def start_engine(
    checkpoint: Location,
    manifest: CheckpointManifest,
    stop_token_ids: frozenset[int],
    tokenizer_size: int,
    spec: ServeSpec,
) -> TorchEngine:
    """Return a `TorchEngine` with the model of a checkpoint; see `StartEngine` in serving/load.py."""
    model = load_verified_model(checkpoint, manifest)
    return own_engine(model, stop_token_ids, tokenizer_size, manifest.seq_len, spec)


def own_engine(
    model: Decoder, stop_token_ids: frozenset[int], tokenizer_size: int, seq_len: int, spec: ServeSpec
) -> TorchEngine:
    """Return a `TorchEngine` for a float32 model in memory, with all experts, which it then owns."""
    if spec.precision == "bfloat16":
        convert_to_bfloat16(model)
    if spec.gpus_per_replica:
        # The conversion to bfloat16 comes before this, because the float32 model may not fit on the GPU.
        model.to("cuda")
    if model.embedding.weight.device.type == "cpu":
        packed_model = pack_model(model, _matrix_type(spec))
    elif spec.max_adapters:
        packed_model = PackedModel(model, PaddedMatrix)
    else:
        packed_model = None
    return TorchEngine(model, stop_token_ids, tokenizer_size, seq_len, spec, packed_model)


def _matrix_type(spec: ServeSpec) -> torch.dtype:
    return torch.bfloat16 if spec.precision == "bfloat16" else torch.float32


def pack_model(model: Decoder, dtype: torch.dtype) -> PackedModel:
    """Replace a CPU model's matrix products, in place, by products that compute each row independently."""
    # Products with packed matrices are faster, but need instructions that not every CPU has. Products with padded
    # rows run on every CPU.
    return PackedModel(model, PaddedMatrix if packed.unavailable_reason(dtype) else PackedMatrix)


def convert_to_bfloat16(model: Decoder) -> None:
    """Convert the weights of matrix products to bfloat16, in place; those of routers and norms stay float32."""
    # Routers have matrices too, but if bfloat16 made two of their scores equal, a token could go to another expert.
    for name in matrix_names(model):
        if ".router." not in name:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(torch.bfloat16)
