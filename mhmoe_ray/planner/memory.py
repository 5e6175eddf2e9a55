"""The bytes that a rank holds in training, computed from the spec. Tests compare them with those of a real step.

The count leaves out the memory of the framework itself, of its allocator and communication buffers (including
DeepSpeed's), and of the data stream. It also leaves out the T x T weights that attention saves where it has no fused
kernel (with attention_dropout on a CPU). Padding needs as much memory as other tokens.
"""

from typing import NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.expert_step import planned_model
from mhmoe_ray.planner.heads import head_activation_bytes, stem_activation_bytes
from mhmoe_ray.planner.sizes import (
    EMBEDDING,
    INT64,
    NORMS,
    OUTPUT,
    ROUTER,
    Sizes,
    block_sizes,
    bytes_of,
    bytes_per_value,
    compute_sizes,
    float32_sizes,
    gathered_bytes,
    model_parts,
)
from mhmoe_ray.spec import EncoderSpec, ModelSpec, MoESpec, RunSpec
from mhmoe_ray.spec.train import LOSS_CHUNKS_PER_PRODUCT


class Memory(NamedTuple):
    """Bytes of memory of one rank."""

    weights: int
    gradients: int
    moments: int
    """Bytes of AdamW's two moments."""
    copies: int
    """Bytes of the copies of weights in the precision of matrix products, if it is not that of the weights. They are
    kept from forward to backward."""
    activations: int
    """Bytes that one micro-batch keeps from forward to backward, including the log-probabilities of all tokens."""
    logits: int
    """Bytes that the loss needs temporarily: those of `loss_bytes`."""
    gathered: int
    """Bytes of tensors that fsdp and zero3 temporarily gather from shards: the sum of `gathered_weight_bytes` and
    `unsharded_gradient_bytes`."""
    checkpoint_copy: int
    """Bytes of `checkpoint_copy_bytes` on CPUs. With GPUs it is 0, because the copy is in the host's memory."""

    @property
    def total(self) -> int:
        return sum(self)

    def as_json(self) -> dict[str, int]:
        """Return all fields and their total as `mhmoe plan --json` prints them; there the key `whole` means
        `gathered`."""
        fields = self._asdict()
        return {"whole": fields.pop("gathered"), **fields, "total": self.total}


def compute_memory(spec: RunSpec) -> Memory:
    """Return the bytes, by kind, that one rank needs for training under uniform routing.

    If the number of experts is adaptive, all tasks have the largest one.
    """
    spec = spec.model_copy(update={"model": spec.model.at_largest_top_k()})
    model, counts = spec.model, compute_sizes(spec.model)
    weights, gradients, moments = _state_bytes(spec, counts)
    tokens = spec.tokens_per_micro_batch
    size = bytes_per_value(spec)
    return Memory(
        weights=weights,
        gradients=gradients,
        moments=moments,
        copies=_copy_bytes(spec, counts) if size < FLOAT32 else 0,
        activations=tokens * _activation_bytes_per_token(spec, size)
        + (FLOAT32 * hidden_output_values(spec, model.encoder) if model.encoder is not None else 0)
        + _task_bytes(spec)
        + _shared_attention_bytes(spec, size)
        + _static_layout_bytes(model, tokens, size)
        + _merged_expert_bytes(spec, size),
        logits=loss_bytes(spec),
        gathered=gathered_weight_bytes(spec) + unsharded_gradient_bytes(spec),
        checkpoint_copy=0 if spec.cluster.gpus_per_worker else checkpoint_copy_bytes(spec),
    )


def loss_bytes(spec: RunSpec) -> int:
    """Return the bytes that the loss needs temporarily.

    With all logits at once, they are the gradients of log-probabilities and of logits, both in float32. A chunked loss
    has the logits and the log-probabilities of a chunk, those of the chunk before it, and the gradient of the output
    layer, all in float32. In the precision of products, it has the gradients of the logits of one product, which takes
    several chunks in a narrow precision, and a copy of the output layer, if this layer is not gathered in that
    precision.
    """
    tokens, vocab_size = spec.tokens_per_micro_batch, spec.model.vocab_size
    if spec.model.encoder is not None:
        return 2 * FLOAT32 * hidden_output_values(spec, spec.model.encoder)
    if spec.model.vision is not None:
        return 0  # the losses of heads are small
    if spec.train.loss_chunk_rows is None:
        return tokens * vocab_size * 2 * FLOAT32
    rows, size = spec.train.loss_chunk_rows, bytes_per_value(spec)
    product_rows = rows if size == FLOAT32 else LOSS_CHUNKS_PER_PRODUCT * rows
    copy_size = size if size < FLOAT32 and not gathers_in_bfloat16(spec) else 0
    return vocab_size * (
        min(rows, tokens) * 3 * FLOAT32 + min(product_rows, tokens) * size + spec.model.d_model * (FLOAT32 + copy_size)
    )


def hidden_output_values(spec: RunSpec, encoder: EncoderSpec) -> int:
    """Return the number of outputs of an encoder for a micro-batch, which it computes for hidden patches and tokens,
    and for all tokens of captions.

    Texts count as if all of them had `data.seq_len` tokens.
    """
    masking, values = spec.train.masking, 0.0
    for part in spec.parts:
        text_values = part.samples * (spec.data.seq_len - 1) * spec.model.vocab_size
        if part.objective == "caption":
            values += text_values
        if part.objective != "masked":
            continue
        is_pair = len(part.columns) > 1
        if "image" in part.columns:
            share = masking.pair_image if is_pair else masking.image
            values += part.samples * share * encoder.patches * encoder.target_values
        if "text" in part.columns:
            share = masking.pair_text if is_pair else masking.text
            values += share * text_values
    return round(values)


def _task_bytes(spec: RunSpec) -> int:
    """Return the bytes that the stems and heads of a vision model keep for a micro-batch; 0 for other models."""
    vision = spec.model.vision
    if vision is None:
        return 0
    stem = spec.tokens_per_micro_batch * stem_activation_bytes(spec.model, vision)
    return stem + sum(part.samples * head_activation_bytes(vision, vision.tasks[part.name]) for part in spec.parts)


def checkpoint_bytes(spec: RunSpec) -> int:
    """Return the bytes of a checkpoint: those of weights and of AdamW's two moments."""
    return (FLOAT32 + 2 * bytes_of(spec.train.moment_precision)) * compute_sizes(spec.model).parameters


def checkpoint_copy_bytes(spec: RunSpec) -> int:
    """Return the bytes of host memory for the copy of weights and moments that a rank writes to a checkpoint, on
    average over ranks.

    The memory stays allocated after the first checkpoint. With GPUs it is pinned.
    """
    return checkpoint_bytes(spec) // spec.cluster.max_world_size


def gathered_weight_bytes(spec: RunSpec) -> int:
    """Return the bytes of the weights that a rank has gathered from shards at the same time, at most; 0 with other
    strategies than fsdp and zero3, or on a single rank."""
    # fsdp gathers the parameters outside blocks for the whole pass, the current block, and the next block in advance.
    # For zero3, `distributed/strategies/zero.py` sets the same upper bound.
    gathers_weights = spec.cluster.strategy in ("fsdp", "zero3") and spec.cluster.max_world_size > 1
    return _outside_bytes(spec) + 2 * _largest_block_bytes(spec) if gathers_weights else 0


def unsharded_gradient_bytes(spec: RunSpec) -> int:
    """Return the bytes of unsharded gradients with fsdp, in addition to the shards; 0 with other strategies or on a
    single rank."""
    if spec.cluster.strategy != "fsdp" or spec.cluster.max_world_size == 1:
        return 0
    # With one micro-batch per rank and step, the gradients of a block are reduced to shards after its backward. Only
    # those of one block and of what is outside blocks are unsharded at a time.
    if spec.train.micro_batches == spec.cluster.max_world_size:
        return _outside_bytes(spec) + _largest_block_bytes(spec)
    counts, size = compute_sizes(spec.model), bytes_of(spec.cluster.reduce_precision)
    # While several micro-batches accumulate, all gradients stay unsharded until the last backward. They take the place
    # of shards, whose bytes are therefore subtracted.
    experts = counts.expert_parameters // spec.cluster.ep
    unsharded = size * (counts.parameters - counts.expert_parameters)
    unsharded += (size if spec.cluster.shards_experts else FLOAT32) * experts
    return unsharded - _state_bytes(spec, counts)[1]


def gathers_in_bfloat16(spec: RunSpec) -> bool:
    """Return whether ranks gather the weights that they hold in shards in bfloat16, and so have no copies of them."""
    return spec.cluster.gather_precision == "bfloat16" and spec.cluster.max_world_size > 1


def _outside_bytes(spec: RunSpec) -> int:
    """Return the bytes of the gathered parameters outside blocks."""
    return gathered_bytes(spec, block_sizes(spec.model).outside, float32_sizes(spec.model).outside)


def _largest_block_bytes(spec: RunSpec) -> int:
    """Return the bytes of the gathered parameters of the largest block, counting only those that ranks hold in
    shards."""
    model, counts, float32_counts = spec.model, block_sizes(spec.model), float32_sizes(spec.model)
    expert_parameters = 0
    if model.moe and spec.cluster.shards_experts and spec.cluster.expert_shard_ranks > 1:
        expert_parameters = compute_sizes(model).expert_parameters // model.moe_layers // spec.cluster.ep
    dense = gathered_bytes(spec, counts.dense, float32_counts.dense)
    mixture = gathered_bytes(spec, counts.mixture + expert_parameters, float32_counts.mixture)
    return max(dense if model.moe_layers < model.layers else 0, mixture if model.moe else 0)


def _state_bytes(spec: RunSpec, counts: Sizes) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and moments under the strategy, on average over ranks."""
    # Experts are sharded over the ranks of a shard group that hold the same experts, and all other tensors over all
    # ranks of the group.
    cluster = spec.cluster
    strategy = cluster.strategy if cluster.max_world_size > 1 else "ddp"
    experts = FLOAT32 * counts.expert_parameters / cluster.ep
    shared = FLOAT32 * (counts.parameters - counts.expert_parameters)
    sharded = shared / cluster.shard_ranks + (
        experts / cluster.expert_shard_ranks if cluster.shards_experts else experts
    )
    unsharded = shared + experts
    # ZeRO has shards of the weights in addition to the weights: its optimizer updates the shards, and the weights are
    # copied from them.
    weights, gradients, moments = {
        "ddp": (unsharded, unsharded, unsharded),
        "fsdp": (sharded, sharded, sharded),
        "zero1": (unsharded + sharded, unsharded, sharded),
        "zero2": (unsharded + sharded, sharded, sharded),
        "zero3": (2 * sharded, sharded, sharded),
    }[strategy]
    moment_size = bytes_of(spec.train.moment_precision) / FLOAT32
    return round(weights), round(gradients), round(2 * moments * moment_size)


def _copy_bytes(spec: RunSpec, counts: Sizes) -> int:
    """Return the bytes of the copies, in the precision of matrix products, of all weights that these products use."""
    experts = counts.expert_parameters // spec.cluster.ep
    if gathers_in_bfloat16(spec):
        # What is gathered in bfloat16 needs no copies, so only experts that are not sharded have some.
        is_sharded = spec.cluster.shards_experts and spec.cluster.expert_shard_ranks > 1
        return 0 if is_sharded else bytes_per_value(spec) * experts
    # The router and the norms over whole tokens compute in float32, so their weights have no copies. An embedding has a
    # copy only if it is tied, because it is then an operand of the output's product. A chunked loss keeps no copy.
    excluded_parts = {ROUTER, NORMS}
    if spec.train.loss_chunk_rows is not None:
        excluded_parts |= {EMBEDDING, OUTPUT}
    elif not spec.model.tied_embeddings:
        excluded_parts.add(EMBEDDING)
    total = sum(part.layers * part.parameters for part in model_parts(spec.model) if part.name not in excluded_parts)
    return bytes_per_value(spec) * (total - counts.expert_parameters + experts)


def _activation_bytes_per_token(spec: RunSpec, size: int) -> int:
    """Return the bytes per token that all layers and the loss keep from forward to backward.

    With `train.recompute` this includes the largest block that is recomputed.
    """
    model = planned_model(spec)
    moe = model.moe
    norm = model.architecture.norm_saved_bytes(model.d_model, size)
    outer = norm + _attention_bytes(model, size) + norm
    hidden = model.architecture.hidden_saved_bytes(model.d_ff, size) if model.d_ff is not None else 0
    dense = outer + hidden
    mixture = outer + (_moe_bytes(model, moe, size) if moe is not None else 0) + hidden * model.has_experts_beside
    noise = _dropout_bytes(model, size) if model.dropout else 0
    block_input = model.d_model * bytes_of(spec.train.residual_precision)
    # With `exchange`, a block with distributed experts is recomputed only up to its second norm, and keeps everything
    # from this norm on.
    if spec.train.recompute == "exchange" and spec.cluster.ep > 1:
        attention_part = norm + _attention_bytes(model, size)
        layers = model.layers * block_input + model.moe_layers * (mixture - attention_part) + max(dense, attention_part)
        layers += noise // model.layers
    # Each block keeps its input. The one block that is being recomputed keeps everything.
    elif spec.train.recompute in ("exchange", "block"):
        layers = model.layers * block_input + max(dense, mixture) + noise // model.layers
    else:
        layers = (model.layers - model.moe_layers) * dense + model.moe_layers * mixture + noise
    # The outputs of an encoder are counted apart, because it computes few of them, and so are the heads of a vision
    # model, which compute per image.
    if model.encoder is not None or model.vision is not None:
        return layers + norm
    # The other terms are those of the last norm, of the loss, and of the token ids and targets. A chunked loss keeps
    # the gradient of its input instead of the input and the log-probabilities.
    if spec.train.loss_chunk_rows is None:
        return layers + norm + FLOAT32 * model.vocab_size + 2 * INT64
    return layers + norm - size * model.d_model + FLOAT32 * model.d_model + 2 * INT64


def _dropout_bytes(model: ModelSpec, size: int) -> int:
    """Return the bytes per token that dropout keeps for the backward in all layers."""
    # Masks have one byte per value. Outputs of experts are kept before and after dropout, because gates apply after it.
    masks = model.d_model * (1 + model.layers + model.dense_layers)
    if model.moe is None:
        return masks
    outputs = model.joined_width * model.moe.top_k
    shared = model.d_model if model.moe.d_shared else 0
    # Router smear has no gates at outputs.
    return masks + model.moe_layers * (outputs * (1 + size * (model.moe.router != "smear")) + shared)


def _shared_attention_bytes(spec: RunSpec, size: int) -> int:
    """Return the bytes that the attention of all layers shares: cosines and sines for queries and for keys, and the
    document mask."""
    if spec.model.encoder is not None or spec.model.vision is not None:
        return 0  # learned positions, and a small mask of padding
    T = spec.data.seq_len
    mask = size * spec.train.micro_batch_size * T**2 if spec.model.document_masks else 0
    return 4 * FLOAT32 * T * spec.model.head_width + mask


def _attention_bytes(model: ModelSpec, size: int) -> int:
    """Return the bytes per token that one attention layer saves for the backward."""
    saved_bytes = model.architecture.attention_saved_bytes(
        model.query_width, model.kv_width, model.attention_heads, size
    )
    if model.qk_norm == "none":
        return saved_bytes
    # RMSNorm saves its normalized rows in float32, and a statistic of each. With a narrower dtype it also saves its
    # input, which is a copy in float32.
    norm_rows = model.attention_heads + model.n_kv_heads if model.qk_norm == "head" else 2
    copies = 1 if size == FLOAT32 else 2
    return saved_bytes + FLOAT32 * (copies * (model.query_width + model.kv_width) + norm_rows)


def _static_layout_bytes(model: ModelSpec, tokens: int, size: int) -> int:
    """Return the additional bytes of kernel `capacity` over all layers; 0 for other kernels."""
    # The additional bytes are those of N x E x C masks, of each choice and of their sums, and of the rows and hidden
    # rows of every slot.
    moe = model.moe
    if moe is None or moe.kernel != "capacity":
        return 0
    rows = tokens * moe.heads
    slots = moe.experts * (moe.expert_capacity(rows) or 0)
    width = model.row_width * size
    hidden = model.architecture.hidden_saved_bytes(moe.d_expert, size)
    # With dropout, each route is a row of its own with the constant weight 1. So no output is kept for the gradient of
    # a gate.
    if model.dropout:
        return model.moe_layers * slots * (2 * moe.top_k * rows * size + width + hidden)
    return model.moe_layers * slots * ((moe.top_k + 2) * rows * size + 2 * width + hidden)


def _merged_expert_bytes(spec: RunSpec, size: int) -> int:
    """Return the bytes of the experts that router smear averages for each sample, over all layers that keep them; 0 for
    other routers.

    They are weights, so that they do not depend on the lengths of samples. Their gradients, which take as much memory
    for one layer at a time, are left out.
    """
    model = spec.model
    if model.moe is None or model.moe.router != "smear":
        return 0
    expert = model.architecture.expert_parameters(model.row_width, model.moe.d_expert)
    layers = model.moe_layers if spec.train.recompute == "none" else 1
    return layers * spec.samples_per_micro_batch * expert * size


def _expert_hidden_bytes(model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes that an expert saves for the hidden row of one route, on average over routes with and without
    recomputation."""
    has_manual_backward = moe.kernel_limits.kept_rows == "as configured"
    saved_bytes = (
        model.architecture.grouped_hidden_saved_bytes if has_manual_backward else model.architecture.hidden_saved_bytes
    )
    bytes_per_row = saved_bytes(moe.d_expert, size)
    return round((1 - model.recomputed_share) * bytes_per_row)


def _router_bytes(moe: MoESpec, width: int) -> int:
    """Return the bytes that the router saves per sub-token: probabilities, logits, and the values before them."""
    values = 2 * moe.experts + moe.router_sizes(width).saved_values
    if moe.scoring == "sigmoid":
        # Scores are divided by their sum for the load balancing loss, and gates by theirs for the experts.
        values += 1 + (moe.top_k + 1 if moe.normalize_gates else 0)
    return FLOAT32 * values


def _smear_bytes(model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes per token that a layer with router smear saves for the backward, without the averaged experts
    and without what the router saves for each sample."""
    d, architecture = model.d_model, model.architecture
    # The rows of all samples are joined. The result of the norm before the layer is saved only if there is a layer
    # beside the experts.
    total = -d * size * (not model.has_experts_beside)
    if model.recomputed_share:
        total += d * FLOAT32
    else:
        # In a batch of experts, the inner norm and the product with its weight are two operations, and both save rows.
        total += d * size + architecture.hidden_saved_bytes(moe.d_expert, size) + moe.d_expert * size
    if moe.d_shared:
        # The shared expert casts the joined rows for itself.
        total += architecture.hidden_saved_bytes(moe.d_shared, size) + d * size * (size < FLOAT32)
    return total


def _moe_bytes(model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes per token that one mixture-of-experts layer saves for the backward, without the static layout of
    kernel `capacity` and without dropout."""
    d, joined_width, routes = model.d_model, model.joined_width, moe.heads * moe.top_k
    if moe.router == "smear":
        return _smear_bytes(model, moe, size)
    row_bytes = routes * model.row_width * size
    total = 0
    if moe.kernel != "capacity":
        total += row_bytes + routes * _expert_hidden_bytes(model, moe, size) + row_bytes + routes * FLOAT32
    # The result of the norm before the layer is saved if it is an operand of a matrix product.
    is_norm_saved = moe.has_head_projection or bool(moe.d_shared)
    # The next bytes are the router's input, unless it counts already as the result of the norm, and the factors of
    # jitter.
    saves_input = moe.has_head_projection or size < FLOAT32 or (moe.jitter > 0 and is_norm_saved)
    total += joined_width * FLOAT32 * (saves_input + (moe.jitter > 0))
    total -= d * size * (size < FLOAT32 and not is_norm_saved)
    # The next bytes are the operand of the merge projection, and that of each further layer of the two projections.
    total += (
        joined_width
        * size
        * (
            moe.has_merge_projection
            + (moe.projection_layers - 1) * (moe.has_head_projection + moe.has_merge_projection)
        )
    )
    # The next bytes are the values of the router, and the choice and the mask of each route.
    total += moe.heads * (_router_bytes(moe, model.row_width) + FLOAT32) + routes * (INT64 + 1)
    if moe.d_shared:
        total += model.architecture.hidden_saved_bytes(moe.d_shared, size)
        # The head projection and the shared expert each cast the result of the norm for themselves.
        total += d * size * (size < FLOAT32 and moe.has_head_projection)
    return total
