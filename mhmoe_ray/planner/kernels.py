"""The kernel that a plan assumes for the experts, and the number of GPU kernels that a decoder's micro-batch launches.

The constants of launches here and in each architecture (`dense_launches`, `mixture_launches`) are numbers of operations
that torch dispatches in a micro-batch after a step's first one, which adds gradients. tests/planner/test_launches.py
compares their sums with a step that is counted.
"""

from mhmoe_kernels.abilities import KERNELS, KernelName
from mhmoe_kernels.choice import TRITON_KERNELS, gpu_kernels
from mhmoe_ray.spec import ModelSpec, RunSpec

ASSUMED_MAJOR = 9
"""Major number of the compute capability of the GPUs that plans are made for: that of an H100."""

OUTSIDE_BLOCKS = 70
"""Number of launches per micro-batch outside blocks: embedding, output and loss."""
LOSS_CHUNK = 12
"""Number of launches per chunk of the loss."""
HEAD_PROJECTIONS = 18
"""Number of launches for a layer's head and merge projections, forward and backward."""
DISPATCH = 19
"""Number of launches by which flat dispatch in one pass exceeds local experts, forward and backward: 12 kernels and 7
exchanges."""
COMPILED_SHARE = 0.68
"""Share of a block's launches that remain if it is compiled: 0.60 to 0.71, counted with different heads and layers."""
LOOP_BLOCK, LOOP_EXPERT = 120, 19
"""Numbers of launches of a loop over experts: for a block without its experts, and for each expert."""


def assumed_kernel(spec: RunSpec) -> KernelName | None:
    """Return the kernel that will probably compute the experts; None for a dense model and for the router `smear`.

    The router `smear` needs no kernel: torch computes its averaged experts as batched matrix products.
    """
    # `mhmoe_kernels.choose_kernel` would need the run's hardware, so its choice for `auto` is predicted: on GPUs, that
    # for an H100, and on CPUs, grouped. On CPUs with AMX the run chooses cpp instead, which needs less memory.
    moe = spec.model.moe
    if moe is None or moe.router == "smear":
        return None
    if spec.train.adapter:
        # The kernel of experts with frozen weights keeps what autograd keeps, like this one.
        return "reference"
    if moe.kernel != "auto":
        return moe.kernel
    if not spec.cluster.gpus_per_worker:
        return "grouped"
    assert spec.expert_sizes is not None
    return next(gpu_kernels("training", ASSUMED_MAJOR, spec.expert_sizes))


def may_use_cpp(spec: RunSpec) -> bool:
    """Return whether a run on CPUs with AMX (Intel's matrix units) would get the kernel `cpp` for `auto`."""
    model, moe, limits = spec.model, spec.model.moe, KERNELS["cpp"]
    if moe is None or moe.kernel != "auto" or moe.router == "smear" or spec.cluster.gpus_per_worker:
        return False
    has_valid_sizes = not (model.row_width % limits.size_multiple or moe.d_expert % limits.size_multiple)
    has_valid_function = model.architecture.expert_function in (limits.functions or ())
    return has_valid_sizes and has_valid_function and spec.train.precision == limits.precision


def planned_model(spec: RunSpec) -> ModelSpec:
    """Return the run's model (`RunSpec.computed_model`) with the kernel of `assumed_kernel` in place of `auto`."""
    model, kernel = spec.computed_model, assumed_kernel(spec)
    if model.moe is None or kernel is None:
        return model
    return model.model_copy(update={"moe": model.moe.model_copy(update={"kernel": kernel})})


def launches_per_micro_batch(spec: RunSpec) -> int:
    """Return the number of kernels that a rank launches for a decoder's micro-batch."""
    model, moe, kernel = spec.model, spec.model.moe, assumed_kernel(spec)
    dense_blocks, mixture_blocks = model.layers - model.moe_layers, model.moe_layers
    block_launches = dense_blocks * model.architecture.dense_launches
    if moe is not None and kernel is not None:
        local_experts = moe.experts // spec.cluster.ep
        block = model.architecture.mixture_launches.get(kernel, LOOP_BLOCK + LOOP_EXPERT * local_experts)
        block_launches += mixture_blocks * (block + HEAD_PROJECTIONS * (moe.heads > 1))
    if spec.train.compile:
        block_launches = round(COMPILED_SHARE * block_launches)
    # The exchange between ranks is not compiled.
    if spec.cluster.ep > 1 and kernel in TRITON_KERNELS:
        block_launches += mixture_blocks * DISPATCH
    loss_launches = 0
    if spec.train.loss_chunk_rows is not None:
        loss_launches = LOSS_CHUNK * -(-spec.tokens_per_micro_batch // spec.train.loss_chunk_rows)
    # The forward of a block has about a third of its kernels. If blocks are recomputed, it runs twice, so the factor is
    # 4 / 3.
    recomputes_blocks = spec.train.recompute in ("exchange", "block")
    return OUTSIDE_BLOCKS + loss_launches + round(block_launches * (4 / 3 if recomputes_blocks else 1))
