"""Bytes of memory that a rank holds in training, computed from the spec. Tests compare them with a real step.

The count leaves out the memory of the framework itself, of its allocator and communication buffers (including
DeepSpeed's), and of the data stream. It also leaves out the T x T weights that attention saves where it has no fused
kernel (with attention_dropout on a CPU). Padding needs as much memory as other tokens.
"""

from typing import NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.activations import activation_bytes_per_token, merged_expert_bytes, static_layout_bytes
from mhmoe_ray.planner.family import (
    EMBEDDING,
    EXPERTS,
    FEED_FORWARD,
    NORMS,
    OUTPUT,
    ROUTER,
    SHARED,
    bytes_of,
    plan_of,
)
from mhmoe_ray.planner.sizes import (
    adapter_sizes,
    block_sizes,
    bytes_per_value,
    compute_sizes,
    float32_parameters,
    float32_sizes,
    gathered_bytes,
    model_parts,
    trained_sizes,
)
from mhmoe_ray.spec import ClusterSpec, RunSpec


class Memory(NamedTuple):
    """Bytes of memory of one rank."""

    weights: int
    gradients: int
    moments: int
    """Bytes of AdamW's two moments, and of the average of the weights with `train.ema_decay`."""
    copies: int
    """Bytes of copies of the weights for matrix products in another precision than float32, kept from forward to
    backward."""
    activations: int
    """Bytes that one micro-batch keeps from forward to backward, including the log-probabilities of all tokens."""
    logits: int
    """Bytes that the loss needs temporarily."""
    gathered: int
    """Bytes of tensors that fsdp and zero3 temporarily gather: `gathered_weight_bytes` and
    `unsharded_gradient_bytes`."""
    checkpoint_copy: int
    """Bytes of the copy for a checkpoint (`checkpoint_copy_bytes`); 0 with GPUs, because it is in the host's memory."""

    @property
    def total(self) -> int:
        return sum(self)

    def as_json(self) -> dict[str, int]:
        """Return all fields and their total as `mhmoe plan --json` prints them; the key of `gathered` is `whole`."""
        fields = self._asdict()
        return {"whole": fields.pop("gathered"), **fields, "total": self.total}


def compute_memory(spec: RunSpec) -> Memory:
    """Return the bytes that one rank needs for training under uniform routing, with the largest top-k of all tasks."""
    spec = spec.model_copy(update={"model": spec.model.at_largest_top_k()})
    plan = plan_of(spec.model)
    weights, gradients, moments = _state_bytes(spec)
    tokens = spec.tokens_per_micro_batch
    size = bytes_per_value(spec)
    return Memory(
        weights=weights,
        gradients=gradients,
        moments=moments,
        copies=weight_copy_bytes(spec),
        activations=tokens * activation_bytes_per_token(spec, size)
        + plan.output_bytes(spec, size)
        + plan.shared_attention_bytes(spec, size)
        + static_layout_bytes(spec, size)
        + merged_expert_bytes(spec, size),
        logits=plan.loss_bytes(spec),
        gathered=gathered_weight_bytes(spec) + unsharded_gradient_bytes(spec),
        checkpoint_copy=0 if spec.cluster.gpus_per_worker else checkpoint_copy_bytes(spec),
    )


def checkpoint_bytes(spec: RunSpec) -> int:
    """Return the bytes of a checkpoint, which has the trained weights, their average, and AdamW's two moments."""
    weight_bytes = FLOAT32 * (1 + (spec.train.ema_decay is not None))
    return (weight_bytes + 2 * bytes_of(spec.train.moment_precision)) * trained_sizes(spec).parameters


def checkpoint_copy_bytes(spec: RunSpec) -> int:
    """Return the mean bytes of host memory of a rank for the weights and moments that it writes to a checkpoint.

    The memory stays allocated after the first checkpoint. With GPUs it is pinned.
    """
    return checkpoint_bytes(spec) // spec.cluster.max_world_size


def gathered_weight_bytes(spec: RunSpec) -> int:
    """Return the most bytes of weights that fsdp or zero3 gathers from shards at a time; 0 otherwise or on one rank."""
    # fsdp gathers the current block and, in advance, the next one. The parameters outside blocks stay gathered for the
    # whole pass. For zero3, `distributed/strategies/zero.py` sets the same upper bound.
    gathers_weights = spec.cluster.strategy in ("fsdp", "zero3") and spec.cluster.max_world_size > 1
    return _outside_bytes(spec) + 2 * _largest_block_bytes(spec) if gathers_weights else 0


def unsharded_gradient_bytes(spec: RunSpec) -> int:
    """Return the bytes of unsharded gradients that fsdp holds in addition to the shards; 0 otherwise or on one rank."""
    if spec.cluster.strategy != "fsdp" or spec.cluster.max_world_size == 1:
        return 0
    # If each backward reduces gradients, those of a block become shards after its backward. Only those of one block and
    # of the parameters outside blocks are unsharded at a time.
    if spec.cluster.reduce_after == "micro_batch" or spec.train.micro_batches == spec.cluster.max_world_size:
        if spec.train.adapter:
            return bytes_of(spec.cluster.reduce_precision) * trained_sizes(spec).parameters // spec.model.layers
        return _outside_bytes(spec) + _largest_block_bytes(spec)
    counts, size = trained_sizes(spec), bytes_of(spec.cluster.reduce_precision)
    # While several micro-batches accumulate, all gradients stay unsharded until the last backward. They take the place
    # of shards, whose bytes are therefore subtracted.
    experts = counts.expert_parameters // spec.cluster.ep
    unsharded = size * (counts.parameters - counts.expert_parameters)
    unsharded += (size if spec.cluster.shards_experts else FLOAT32) * experts
    return unsharded - _state_bytes(spec)[1]


def _outside_bytes(spec: RunSpec) -> int:
    return gathered_bytes(spec, block_sizes(spec.model).outside, float32_sizes(spec.model).outside)


def _largest_block_bytes(spec: RunSpec) -> int:
    """Return the gathered bytes of the largest block, without parameters that ranks do not hold in shards."""
    model, counts, float32_counts = spec.model, block_sizes(spec.model), float32_sizes(spec.model)
    expert_parameters = 0
    if model.moe and spec.cluster.shards_experts and spec.cluster.expert_shard_ranks > 1:
        expert_parameters = compute_sizes(model).expert_parameters // model.moe_layers // spec.cluster.ep
    dense = gathered_bytes(spec, counts.dense, float32_counts.dense)
    mixture = gathered_bytes(spec, counts.mixture + expert_parameters, float32_counts.mixture)
    return max(dense if model.moe_layers < model.layers else 0, mixture if model.moe else 0)


def _state_bytes(spec: RunSpec) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and moments of a rank, as a mean over ranks."""
    strategy = spec.cluster.strategy if spec.cluster.max_world_size > 1 else "ddp"
    trained, moment_size = trained_sizes(spec), bytes_of(spec.train.moment_precision) / FLOAT32
    unsharded, sharded = _held_bytes(spec.cluster, trained.parameters, trained.expert_parameters)
    # ZeRO has shards of the weights in addition to the weights: its optimizer updates the shards, and the weights are
    # copied from them.
    weights, gradients, moments = {
        "ddp": (unsharded, unsharded, unsharded),
        "fsdp": (sharded, sharded, sharded),
        "zero1": (unsharded + sharded, unsharded, sharded),
        "zero2": (unsharded + sharded, sharded, sharded),
        "zero3": (2 * sharded, sharded, sharded),
    }[strategy]
    if spec.train.adapter:
        base, wide = compute_sizes(spec.model), float32_parameters(spec.model)
        narrow = bytes_of(spec.train.adapter.base_precision) / FLOAT32
        is_sharded = strategy == "fsdp"
        weights += narrow * _held_bytes(spec.cluster, base.parameters - wide, base.expert_parameters)[is_sharded]
        weights += _held_bytes(spec.cluster, wide, 0)[is_sharded]
    has_average = spec.train.ema_decay is not None
    return round(weights), round(gradients), round(moments * (2 * moment_size + has_average))


def _held_bytes(cluster: ClusterSpec, parameters: int, expert_parameters: int) -> tuple[float, float]:
    """Return the float32 bytes of parameters that a rank holds, as a mean over ranks: without shards, and in shards."""
    # Experts are sharded over the ranks of a shard group that hold the same experts, and all other tensors over all
    # ranks of the group.
    experts = FLOAT32 * expert_parameters / cluster.ep
    shared = FLOAT32 * (parameters - expert_parameters)
    expert_shards = experts / cluster.expert_shard_ranks if cluster.shards_experts else experts
    return shared + experts, shared / cluster.shard_ranks + expert_shards


def weight_copy_bytes(spec: RunSpec) -> int:
    """Return the bytes of copies of weights for matrix products in another precision than float32."""
    if bytes_per_value(spec) == FLOAT32:
        return 0
    adapter = adapter_sizes(spec)
    adapter_copies = adapter.parameters - adapter.expert_parameters + adapter.expert_parameters // spec.cluster.ep
    if spec.train.adapter and spec.train.adapter.base_precision == "bfloat16":
        # A tied embedding stays float32 and is an operand of the output's product.
        tied = spec.model.vocab_size * spec.model.d_model if spec.model.tied_embeddings else 0
        return bytes_per_value(spec) * (adapter_copies + tied)
    shards_experts = spec.cluster.shards_experts and spec.cluster.expert_shard_ranks > 1
    # Weights that are gathered in bfloat16 need no copies, so only experts that are not sharded have some. The router
    # and the norms over whole tokens compute in float32, so their weights have no copies. An embedding has a copy only
    # if it is tied, because it is then an operand of the output's product. A chunked loss keeps no copy.
    excluded_parts = {ROUTER, NORMS}
    if spec.train.loss_chunk_rows is not None:
        excluded_parts |= {EMBEDDING, OUTPUT}
    elif not spec.model.tied_embeddings:
        excluded_parts.add(EMBEDDING)
    parts = [part for part in model_parts(spec.model) if part.name not in excluded_parts]
    if spec.cluster.gathers_in_bfloat16:
        parts, adapter_copies = [part for part in parts if part.name == EXPERTS and not shards_experts], 0
    # A recomputed block frees the copies of gathered weights of feed-forward layers and experts, so they exist for one
    # block at a time. Autocast itself copies all other weights, and keeps the copies until the forward ends.
    freed_parts: set[str] = set()
    is_gathered = spec.cluster.strategy == "fsdp" and spec.cluster.max_world_size > 1
    if is_gathered and spec.train.recompute in ("exchange", "block"):
        freed_parts.add(FEED_FORWARD)
        if spec.train.recompute == "block" or spec.cluster.ep == 1:
            freed_parts |= {SHARED, *([EXPERTS] if shards_experts else [])}
    copied = sum(
        (1 if part.name in freed_parts else part.layers)
        * (part.parameters // spec.cluster.ep if part.name == EXPERTS else part.parameters)
        for part in parts
    )
    return bytes_per_value(spec) * (adapter_copies + copied)
