"""Parallelism over ranks: the mesh, expert-parallel dispatch, and how ranks hold the parameters that all of them need.

    mesh.py         dp x ep: this rank's process groups
    dispatch/       send rows to the ranks that hold their experts, and outputs back
    strategies/     parameters whole or sharded: ddp, fsdp, zero
    optimizer.py    AdamW and its learning-rate schedule
    build.py        build the dispatch and the strategy that the spec names

How each tensor is held and its gradient is reduced, for world = dp x ep (`cluster.strategy`):

    | tensor         | strategy      | held as                       | in a checkpoint                     |
    | -------------- | ------------- | ----------------------------- | ----------------------------------- |
    | experts        | all           | this rank's E / ep experts    | DTensor over E, Shard(0) on ep      |
    |                | shard_experts | these, each sharded over dp   | DTensor over E, sharded on dp, ep   |
    | all the others | ddp           | whole                         | plain, written once                 |
    |                | fsdp          | a shard over all ranks        | DTensor, Shard(0) over all          |
    |                | zero1, zero2  | whole; moments (zero2: and    | plain, gathered by DeepSpeed        |
    |                |               | gradients) sharded            |                                     |
    |                | zero3         | a shard, of everything        | the same                            |

If several ranks hold the same tensor or shard, the rank with the least to write so far writes it
(`checkpoint.save.Shares`). A checkpoint holds no random state: all draws are made from the seed and the number of the
micro-batch.

    | gradient       | is                         | reduced by                                                        |
    | -------------- | -------------------------- | ----------------------------------------------------------------- |
    | of experts     | sum over dp, over dp * ep  | an all-reduce of ours, FSDP with a sum, or ZeRO's expert groups   |
    | of the others  | mean over dp x ep          | DDP, FSDP or ZeRO                                                 |

A checkpoint written by any of them is read by any other, at any number of ranks.
"""
