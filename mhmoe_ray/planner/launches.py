"""The number of GPU kernels that a rank launches for the forward and backward of a decoder's micro-batch.

The constants here and in each architecture (`dense_launches`, `mixture_launches`) are numbers of operations that torch
dispatches; tests/planner/test_launches.py compares their sums with a real model. A compiled model launches fewer.
"""

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.planner.expert_step import assumed_kernel
from mhmoe_ray.spec import RunSpec

OUTSIDE_BLOCKS = 58
"""Number of launches per micro-batch outside blocks: embedding, output and loss."""
LOSS_CHUNK = 14
"""Number of launches per chunk of the loss."""
HEAD_PROJECTIONS = 18
"""Number of launches for a layer's head and merge projections, forward and backward."""
LOOP_BLOCK, LOOP_EXPERT = 120, 19
"""Numbers of launches of a loop over experts: for a block without its experts, and for each expert."""


def launches_per_micro_batch(spec: RunSpec) -> int:
    """Return the number of kernels that a rank launches for a decoder's micro-batch."""
    model, moe, kernel = spec.model, spec.model.moe, assumed_kernel(spec)
    dense_blocks, mixture_blocks = model.layers - model.moe_layers, model.moe_layers
    architecture = ARCHITECTURES[model.backbone]
    block_launches = dense_blocks * architecture.dense_launches
    if moe is not None and kernel is not None:
        local_experts = moe.experts // spec.cluster.ep
        block = architecture.mixture_launches.get(kernel, LOOP_BLOCK + LOOP_EXPERT * local_experts)
        block_launches += mixture_blocks * (block + HEAD_PROJECTIONS * (moe.heads > 1))
    loss_launches = 0
    if spec.train.loss_chunk_rows is not None:
        loss_launches = LOSS_CHUNK * -(-spec.tokens_per_micro_batch // spec.train.loss_chunk_rows)
    # The forward of a block has about a third of its kernels. If blocks are recomputed, it runs twice, so the factor is
    # 4 / 3.
    recomputes_blocks = spec.train.recompute in ("exchange", "block")
    return OUTSIDE_BLOCKS + loss_launches + round(block_launches * (4 / 3 if recomputes_blocks else 1))
