"""Bytes that a rank holds in training, computed from the spec; tests compare them with what a real step keeps.

The count leaves out the memory of the framework itself, of its allocator and communication buffers (DeepSpeed's among
them), and of the data stream. It also leaves out the T x T weights that attention keeps where it has no fused kernel
(with attention_dropout on a CPU). Padding is computed like any token, so it changes nothing.
"""

from typing import NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.expert_step import planned_model
from mhmoe_ray.planner.sizes import EMBEDDING, INT64, NORMS, ROUTER, Sizes, blocks, compute_bytes, parts, sizes
from mhmoe_ray.spec import ClusterSpec, ModelSpec, MoESpec, RunSpec

CHECKPOINT_BYTES = 3 * FLOAT32
"""Bytes per parameter in a checkpoint: its weight and AdamW's two moments."""


class Memory(NamedTuple):
    weights: int
    gradients: int
    moments: int
    """Bytes of AdamW's two moments."""
    copies: int
    """Bytes of copies of the weights in the precision of matrix products, if it differs from their own; kept from
    forward to backward."""
    activations: int
    """Bytes that one micro-batch keeps from forward to backward, including the log-probabilities of all tokens."""
    logits: int
    """Bytes that the loss needs in addition for a moment: gradients of log-probabilities and of logits, both in
    float32."""
    whole: int
    """Bytes, with fsdp and zero3, of tensors gathered from shards for a while: see `whole_weights` and
    `whole_gradients`."""
    checkpoint_copy: int
    """Bytes of `checkpoint_copy` on CPUs. With GPUs the copy is in the host's memory and does not count here."""

    @property
    def total(self) -> int:
        return sum(self)


def memory(spec: RunSpec) -> Memory:
    """Return the memory of one rank, whose experts get the rows of uniform routing."""
    model, found = spec.model, sizes(spec.model)
    weights, gradients, moments = _held(spec.cluster, found)
    tokens = spec.tokens_per_micro_batch
    size = compute_bytes(spec)
    return Memory(
        weights=weights,
        gradients=gradients,
        moments=moments,
        copies=_copies(spec, found) if size < FLOAT32 else 0,
        activations=tokens * _kept_per_token(spec, size) + _shared(spec, size) + _static_layout(model, tokens, size),
        logits=tokens * model.vocab_size * 2 * FLOAT32,
        whole=whole_weights(spec) + whole_gradients(spec),
        checkpoint_copy=0 if spec.cluster.gpus_per_worker else checkpoint_copy(spec),
    )


def checkpoint_copy(spec: RunSpec) -> int:
    """Return the bytes of host memory, pinned beside a GPU, for a rank's share of weights and moments while a
    checkpoint is written, on average over ranks.

    The memory stays allocated from the first checkpoint on.
    """
    return CHECKPOINT_BYTES * sizes(spec.model).parameters // spec.cluster.world


def whole_weights(spec: RunSpec) -> int:
    """Return the bytes of gathered weights; 0 with other strategies than fsdp and zero3, or on a single rank.

    With fsdp these are the parameters outside blocks for the whole pass, the current block, and the next block, which
    is prefetched. With zero3 this is the upper bound that `distributed/strategies/zero.py` sets for DeepSpeed.
    """
    gathers = spec.cluster.strategy in ("fsdp", "zero3") and spec.cluster.world > 1
    return FLOAT32 * (blocks(spec.model).outside + 2 * _largest_block(spec)) if gathers else 0


def whole_gradients(spec: RunSpec) -> int:
    """Return the bytes of unsharded gradients with fsdp; 0 with other strategies or on a single rank.

    With one micro-batch per rank and step, these are the gradients outside blocks and of one block, in addition to the
    shards of all. If several micro-batches of a step are accumulated, the gradients of everything that is sharded stay
    whole until the last backward, in place of the shards.
    """
    if spec.cluster.strategy != "fsdp" or spec.cluster.world == 1:
        return 0
    if spec.train.micro_batches == spec.cluster.world:
        return FLOAT32 * (blocks(spec.model).outside + _largest_block(spec))
    found = sizes(spec.model)
    whole = FLOAT32 * (found.parameters - found.expert_parameters + found.expert_parameters // spec.cluster.ep)
    return whole - _held(spec.cluster, found)[1]


def _largest_block(spec: RunSpec) -> int:
    """Return the number of parameters of the largest block that ranks hold in shards."""
    model, found, held = spec.model, blocks(spec.model), 0
    if model.moe and spec.cluster.slices_experts and spec.cluster.mesh_sizes()["dp"] > 1:
        held = sizes(model).expert_parameters // model.moe_layers // spec.cluster.ep
    return max(found.dense if model.moe_layers < model.layers else 0, found.mixture + held if model.moe else 0)


def _held(cluster: ClusterSpec, found: Sizes) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and moments under the strategy, on average over ranks.

    Where they are sharded, experts are sharded over the dp ranks that hold the same ones, and everything else over all
    ranks. ZeRO updates shards of its own, from which the weights are copied.
    """
    strategy, world = cluster.strategy if cluster.world > 1 else "ddp", cluster.world
    experts = FLOAT32 * found.expert_parameters / cluster.ep
    others = FLOAT32 * (found.parameters - found.expert_parameters)
    sliced = others / world + (experts / cluster.mesh_sizes()["dp"] if cluster.slices_experts else experts)
    whole = others + experts
    weights, gradients, moments = {
        "ddp": (whole, whole, whole),
        "fsdp": (sliced, sliced, sliced),
        "zero1": (whole + sliced, whole, sliced),
        "zero2": (whole + sliced, sliced, sliced),
        "zero3": (2 * sliced, sliced, sliced),
    }[strategy]
    return round(weights), round(gradients), round(2 * moments)


def _copies(spec: RunSpec, found: Sizes) -> int:
    """Return the bytes of compute-precision copies of all weights that matrix products use.

    The router and the norms over whole tokens compute in float32 and need none.
    """
    without = {ROUTER, NORMS} | (set() if spec.model.tied_embeddings else {EMBEDDING})
    total = sum(part.layers * part.parameters for part in parts(spec.model) if part.name not in without)
    return compute_bytes(spec) * (total - found.expert_parameters * (spec.cluster.ep - 1) // spec.cluster.ep)


def _kept_per_token(spec: RunSpec, size: int) -> int:
    model = planned_model(spec)
    moe = model.moe
    norm = model.architecture.norm_kept(model.d_model, size)
    around = norm + _attention(model, size) + norm
    dense = around + (model.architecture.hidden_kept(model.d_ff, size) if model.d_ff is not None else 0)
    mixture = around + (_moe(model, moe, size) if moe is not None else 0)
    noise = _dropout(model, size) if model.dropout else 0
    if spec.train.recompute and spec.cluster.ep > 1:  # of a block with experts, all from its second norm on
        before = norm + _attention(model, size)
        layers = model.layers * model.d_model * FLOAT32 + model.moe_layers * (mixture - before) + max(dense, before)
        layers += noise // model.layers
    elif spec.train.recompute:  # the input of each block, and all of one, which is computed anew
        layers = model.layers * model.d_model * FLOAT32 + max(dense, mixture) + noise // model.layers
    else:
        layers = (model.layers - model.moe_layers) * dense + model.moe_layers * mixture + noise
    return layers + norm + FLOAT32 * model.vocab_size + 2 * INT64  # ids and targets


def _dropout(model: ModelSpec, size: int) -> int:
    """Return the bytes of dropout per token: masks of one byte per value, and the outputs of experts once more, because
    gates are applied after dropout."""
    masks = model.d_model * (1 + model.layers + model.layers - model.moe_layers)
    if model.moe is None:
        return masks
    outputs = model.d_model * model.moe.top_k
    shared = model.d_model if model.moe.d_shared else 0
    return masks + model.moe_layers * (outputs * (1 + size) + shared)


def _shared(spec: RunSpec, size: int) -> int:
    """Return the bytes that attention shares among all layers: cosines and sines for queries and for keys, and the
    document mask."""
    T = spec.data.seq_len
    mask = size * spec.train.micro_batch_size * T**2 if spec.model.document_masks else 0
    return 4 * FLOAT32 * T * spec.model.head_width + mask


def _attention(model: ModelSpec, size: int) -> int:
    kv_width = model.n_kv_heads * model.head_width
    return model.architecture.attention_kept(model.d_model, kv_width, model.attention_heads, size)


def _static_layout(model: ModelSpec, tokens: int, size: int) -> int:
    """Return the additional bytes of kernel `capacity`, over all layers: N x E x C masks of each choice and of their
    sums, and the rows and hidden rows of every slot; 0 for other kernels."""
    moe = model.moe
    if moe is None or moe.kernel != "capacity":
        return 0
    rows = tokens * moe.heads
    slots = moe.experts * (moe.places(rows) or 0)
    width = model.d_model // moe.heads * size
    hidden = model.architecture.hidden_kept(moe.d_expert, size)
    if model.dropout:  # each route is a row of its own, of weight 1, so that outputs are not kept for a weight's sake
        return model.moe_layers * slots * (2 * moe.top_k * rows * size + width + hidden)
    return model.moe_layers * slots * ((moe.top_k + 2) * rows * size + 2 * width + hidden)


def _hidden_of_expert(model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes that an expert keeps per hidden row, on average over rows with and without recomputation."""
    by_hand = moe.kernel_limits.keeps == "as told"
    kept = model.architecture.hidden_kept_by_grouped if by_hand else model.architecture.hidden_kept
    full = kept(moe.d_expert, size)
    return round((1 - model.recomputes) * full)


def _router(moe: MoESpec, width: int) -> int:
    """Return the bytes that the router keeps per sub-token: probabilities and logits, and what they are computed
    from."""
    return FLOAT32 * (2 * moe.experts + moe.router_sizes(width).kept)


def _moe(model: ModelSpec, moe: MoESpec, size: int) -> int:
    d, routes = model.d_model, moe.heads * moe.top_k
    rows = routes * d // moe.heads * size
    kept = 0
    if moe.kernel != "capacity":
        kept += rows + routes * _hidden_of_expert(model, moe, size) + rows + routes * FLOAT32
    # The router's input, if it is not what the norm's is counted with, and what jitter scaled it by.
    whole_rows = moe.has_head or bool(moe.d_shared)  # the norm's result is the operand of a product
    own = moe.has_head or size < FLOAT32 or (moe.jitter > 0 and whole_rows)
    kept += d * FLOAT32 * (own + (moe.jitter > 0)) - d * size * (size < FLOAT32 and not whole_rows)
    # The merge projection's operand, and one of each further layer of the two.
    kept += d * size * (moe.has_merge + (moe.projection_layers - 1) * (moe.has_head + moe.has_merge))
    # Probabilities and logits; choice and mask of each route.
    kept += moe.heads * (_router(moe, d // moe.heads) + FLOAT32) + routes * (INT64 + 1)
    if moe.d_shared:
        kept += model.architecture.hidden_kept(moe.d_shared, size)
    return kept
