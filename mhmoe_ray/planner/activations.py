"""The bytes of activations that layers keep from forward to backward, computed from the spec."""

from mhmoe_kernels.choice import TRITON_KERNELS
from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.adapters import kept_bytes
from mhmoe_ray.planner.family import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    INT32,
    INT64,
    PROJECTIONS,
    ROUTER,
    SHARED,
    bytes_of,
)
from mhmoe_ray.planner.kernels import planned_model
from mhmoe_ray.spec import ModelSpec, MoESpec, RunSpec

MIXTURE_PARTS = (PROJECTIONS, ROUTER, EXPERTS, SHARED)


def activation_bytes_per_token(spec: RunSpec, size: int) -> int:
    """Return the bytes per token that all blocks and the last norm keep from forward to backward.

    With `train.recompute`, they include all that the largest recomputed block keeps during its recomputation. `size` is
    the bytes per value in matrix products.
    """
    model = planned_model(spec)
    moe = model.moe
    norm = model.architecture.norm_saved_bytes(model.d_model, size)
    mask = model.d_model if model.dropout else 0  # a mask of dropout has one byte per value
    adapter_bytes = {name: kept_bytes(spec, name, size) for name in (ATTENTION, FEED_FORWARD, *MIXTURE_PARTS)}
    attention_part = norm + _attention_bytes(model, size) + mask + adapter_bytes[ATTENTION]
    hidden = model.architecture.hidden_saved_bytes(model.d_ff, size) + mask if model.d_ff is not None else 0
    hidden += adapter_bytes[FEED_FORWARD]
    dense = attention_part + norm + hidden
    mixture = attention_part + norm + hidden * model.has_experts_beside
    if moe is not None:
        mixture += _moe_bytes(spec, model, moe, size) + sum(adapter_bytes[name] for name in MIXTURE_PARTS)
        mixture += _expert_dropout_bytes(model, moe, size) if model.dropout else 0
    block_input = model.d_model * bytes_of(spec.train.residual_precision)
    # With recompute `exchange`, a block with distributed experts is recomputed only up to its second norm, and keeps
    # everything from this norm on.
    if spec.train.recompute == "exchange" and spec.cluster.ep > 1:
        layers = model.layers * block_input + model.moe_layers * (mixture - attention_part) + max(dense, attention_part)
    # Each block keeps its input. The one block that is being recomputed keeps everything.
    elif spec.train.recompute in ("exchange", "block"):
        layers = model.layers * block_input + model.moe_layers * _kept_routing_bytes(spec, model) + max(dense, mixture)
    else:
        layers = (model.layers - model.moe_layers) * dense + model.moe_layers * mixture
    layers += mask  # the mask of dropout after the embedding
    return layers + norm


def _kept_routing_bytes(spec: RunSpec, model: ModelSpec) -> int:
    """Return the bytes per token of what a recomputed layer keeps of its routing: each route's expert and gate and,
    with distributed experts, its places before and after the sort, which are not computed again."""
    moe = model.moe
    if moe is None or moe.router == "smear":
        return 0
    index_size = INT32 if moe.kernel in TRITON_KERNELS else INT64
    return moe.heads * moe.top_k * (INT64 + FLOAT32 + 2 * index_size * (spec.cluster.ep > 1))


def _expert_dropout_bytes(model: ModelSpec, moe: MoESpec, size: int) -> int:
    # Masks have one byte per value. Outputs of experts are kept before and after dropout, because gates apply after it.
    # Router smear applies no gates to the outputs of experts, so only the masks are kept for it.
    outputs = model.joined_width * moe.top_k
    shared = model.d_model if moe.d_shared else 0
    return outputs * (1 + size * (moe.router != "smear")) + shared


def _attention_bytes(model: ModelSpec, size: int) -> int:
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


def static_layout_bytes(spec: RunSpec, size: int) -> int:
    """Return the bytes of masks and slots of kernel `capacity`, 0 of others, in all layers that keep them at a time."""
    # The bytes are those of the N x E x C masks (rows x experts x slots) of each choice and of their sums, and those of
    # the rows and hidden rows of every slot.
    model, moe = spec.model, spec.model.moe
    if moe is None or moe.kernel != "capacity":
        return 0
    rows = spec.tokens_per_micro_batch * moe.heads
    slots = moe.experts * (moe.expert_capacity(rows) or 0)
    width = model.row_width * size
    hidden = model.architecture.hidden_saved_bytes(moe.d_expert, size)
    layers = _kept_mixture_layers(spec)
    # With dropout, each route is a row of its own with the constant weight 1. So no output is kept for the gradient of
    # a gate.
    if model.dropout:
        return layers * slots * (2 * moe.top_k * rows * size + width + hidden)
    return layers * slots * ((moe.top_k + 2) * rows * size + 2 * width + hidden)


def merged_expert_bytes(spec: RunSpec, size: int) -> int:
    """Return the bytes of averaged experts of router smear, 0 of others, in all layers that keep them at a time.

    There is one averaged expert per layer and sample. It consists of weights, so its
    size does not depend on the sample's length. The gradients, which take as much memory for one layer at a time, are
    left out.
    """
    model = spec.model
    if model.moe is None or model.moe.router != "smear":
        return 0
    expert = model.architecture.expert_parameters(model.row_width, model.moe.d_expert)
    return _kept_mixture_layers(spec) * spec.samples_per_micro_batch * expert * size


def _kept_mixture_layers(spec: RunSpec) -> int:
    """Return the number of expert layers that keep values at a time: all, or only the one that is being recomputed."""
    return spec.model.moe_layers if spec.train.recompute == "none" else 1


def _expert_hidden_bytes(model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes that an expert saves for the hidden row of one route, as a mean over all routes."""
    has_manual_backward = moe.kernel_limits.kept_rows == "as configured"
    saved_bytes = (
        model.architecture.grouped_hidden_saved_bytes if has_manual_backward else model.architecture.hidden_saved_bytes
    )
    bytes_per_row = saved_bytes(moe.d_expert, size)
    return round((1 - model.recomputed_share) * bytes_per_row)


def _router_bytes(moe: MoESpec, width: int) -> int:
    """Return the bytes per sub-token that the router saves for the backward."""
    # A fused router computes the probabilities again.
    values = (1 if _fuses_routing(moe) else 2) * moe.experts + moe.router_sizes(width).saved_values
    if moe.scoring == "sigmoid":
        # Scores are divided by their sum for the load balancing loss, and gates by theirs for the experts.
        values += 1 + (moe.top_k + 1 if moe.normalize_gates else 0)
    return FLOAT32 * values


def _smear_bytes(model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes per token that router smear saves in a layer, without averaged experts and values per sample."""
    d, architecture = model.d_model, model.architecture
    # The experts read a joined copy of the rows of all samples. So the result of the norm before the layer is saved
    # only if a dense feed-forward layer beside the experts reads it.
    total = -d * size * (not model.has_experts_beside)
    if model.recomputed_share:
        total += d * FLOAT32
    else:
        # The merged experts run as one batch. In it, the inner norm and the product with its weight are two operations,
        # and both save rows.
        total += d * size + architecture.hidden_saved_bytes(moe.d_expert, size) + moe.d_expert * size
    if moe.d_shared:
        # The shared expert casts the joined rows for itself.
        total += architecture.hidden_saved_bytes(moe.d_shared, size) + d * size * (size < FLOAT32)
    return total


def _triton_expert_bytes(spec: RunSpec, model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes per token that the experts of `TRITON_KERNELS` save; they need no outputs for the gates."""
    routes, recomputed_share = moe.heads * moe.top_k, model.recomputed_share
    row_bytes = routes * model.row_width * size
    total = row_bytes if spec.cluster.ep > 1 and spec.cluster.dispatch == "hierarchical" else 0
    # With dropout, each route is a row of its own.
    if recomputed_share < 1 or model.dropout:
        total += row_bytes
    # The backward gathers rows again from the layer's input, which the router may have saved already.
    elif moe.jitter or not (size == FLOAT32 or (_fuses_logits(moe) and moe.has_head_projection)):
        total += model.joined_width * size
    # grouped_mm keeps all hidden rows or none.
    if moe.kernel != "grouped_mm" or not recomputed_share:
        total += routes * _expert_hidden_bytes(model, moe, size)
    # A route has a gate, and its places before and after the sort.
    return total + routes * 3 * FLOAT32


def _fuses_logits(moe: MoESpec) -> bool:
    """Return whether the router reads rows as they are; otherwise it makes a copy in float32."""
    return moe.kernel in TRITON_KERNELS and moe.router == "linear" and not moe.jitter


def _fuses_routing(moe: MoESpec) -> bool:
    return moe.kernel in TRITON_KERNELS and moe.has_plain_routing and moe.second_expert != "random"


def _moe_bytes(spec: RunSpec, model: ModelSpec, moe: MoESpec, size: int) -> int:
    """Return the bytes per token that a layer saves, without slots of kernel `capacity` and masks of dropout."""
    d, joined_width, routes = model.d_model, model.joined_width, moe.heads * moe.top_k
    if moe.router == "smear":
        return _smear_bytes(model, moe, size)
    total = 0
    if moe.kernel in TRITON_KERNELS:
        total += _triton_expert_bytes(spec, model, moe, size)
    elif moe.kernel != "capacity":
        row_bytes = routes * model.row_width * size
        total += row_bytes + routes * _expert_hidden_bytes(model, moe, size) + row_bytes + routes * FLOAT32
    # The result of the norm before the layer is saved if it is an operand of a matrix product.
    is_norm_saved = moe.has_head_projection or bool(moe.d_shared)
    # The next bytes are the router's input, unless it counts already as the result of the norm, and the factors of
    # jitter.
    saves_input = moe.has_head_projection or size < FLOAT32 or (moe.jitter > 0 and is_norm_saved)
    input_size = size if _fuses_logits(moe) and moe.has_head_projection else FLOAT32
    total += joined_width * (input_size * saves_input + FLOAT32 * (moe.jitter > 0))
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
    # The next bytes are the values of the router, and the choice of each route with its mask, if there is one.
    has_mask = not _fuses_routing(moe) or moe.capacity_factor is not None
    total += moe.heads * (_router_bytes(moe, model.row_width) + FLOAT32) + routes * (INT64 + has_mask)
    if moe.d_shared:
        total += model.architecture.hidden_saved_bytes(moe.d_shared, size)
        # The head projection and the shared expert each cast the result of the norm for themselves.
        total += d * size * (size < FLOAT32 and moe.has_head_projection)
    return total
