"""The number of kernels that a GPU is told to launch in a training step.

The counts are those of the operations that a model dispatches, which tests/planner/test_launches.py counts again. A
compiled model (`train.compile`) launches fewer.
"""

from mhmoe_kernels.abilities import KernelName
from mhmoe_ray.planner.expert_step import assumed_kernel
from mhmoe_ray.spec import RunSpec

OUTSIDE_BLOCKS = 58
"""Kernels of a micro-batch outside its blocks, forward and backward: embedding, output and loss."""
LOSS_CHUNK = 14
"""Kernels of a chunk of the loss (`train.loss_chunk_rows`)."""
DENSE_BLOCK = 113
"""Kernels of a block with a dense layer."""
MIXTURE_BLOCKS: dict[KernelName, int] = {"grouped_gemm": 129, "grouped_mm": 139, "triton": 125}
"""Kernels of a block with experts and one head, by the kernel of its experts."""
HEAD_PROJECTIONS = 18
"""Kernels of the head and merge projections of a layer."""
LOOP_BLOCK, LOOP_EXPERT = 120, 19
"""Kernels of a block whose experts run one after another, and those of each expert."""


def launches_per_micro_batch(spec: RunSpec) -> int:
    """Return the number of kernels that a rank launches for the forward and backward of a micro-batch."""
    model, moe, kernel = spec.model, spec.model.moe, assumed_kernel(spec)
    dense_blocks, mixture_blocks = model.layers - model.moe_layers, model.moe_layers
    block_launches = dense_blocks * DENSE_BLOCK
    if moe is not None and kernel is None:
        # The merged experts of router smear run like a dense layer, and few kernels more merge them.
        block_launches += mixture_blocks * DENSE_BLOCK
    elif moe is not None and kernel is not None:
        local_experts = moe.experts // spec.cluster.ep
        block = MIXTURE_BLOCKS.get(kernel, LOOP_BLOCK + LOOP_EXPERT * local_experts)
        block_launches += mixture_blocks * (block + HEAD_PROJECTIONS * (moe.heads > 1))
    # The forward, which is computed twice if blocks are recomputed, has about a third of the kernels.
    loss_launches = 0
    if spec.train.loss_chunk_rows is not None:
        loss_launches = LOSS_CHUNK * -(-spec.tokens_per_micro_batch // spec.train.loss_chunk_rows)
    recomputes_blocks = spec.train.recompute in ("exchange", "block")
    return OUTSIDE_BLOCKS + loss_launches + round(block_launches * (4 / 3 if recomputes_blocks else 1))
