"""What ranks do together: the mesh, expert-parallel dispatch, and how they hold what all of them need.

    mesh.py         dp x ep: this rank's groups
    dispatch/       rows to the ranks that hold their experts, and outputs back
    strategies/     parameters whole or in slices: ddp, fsdp, zero
    optimizer.py    AdamW and its learning-rate schedule
    build.py        from the spec's words to a dispatch and a strategy

How each tensor is held and its gradient made whole, for world = dp x ep (`cluster.strategy`):

    | tensor         | strategy      | held as                       | in a checkpoint                     |
    | -------------- | ------------- | ----------------------------- | ----------------------------------- |
    | experts        | all           | this rank's E / ep experts    | DTensor over E, Shard(0) on ep      |
    |                | shard_experts | and of each a slice over dp   | DTensor over E, sharded on dp, ep   |
    | all the others | ddp           | whole                         | plain, written once                 |
    |                | fsdp          | a slice over all ranks        | DTensor, Shard(0) over all          |
    |                | zero1, zero2  | whole; moments (zero2: and    | plain, put together by DeepSpeed    |
    |                |               | gradients) in slices          |                                     |
    |                | zero3         | a slice, all of it            | the same                            |

Of what several ranks hold, the one that has least to write so far writes it (`checkpoint.save.Shares`). Nothing random
is in a checkpoint: all draws are made from the seed and the number of the micro-batch.

    | gradient       | is                         | made whole by                                                     |
    | -------------- | -------------------------- | ----------------------------------------------------------------- |
    | of experts     | sum over dp, over dp * ep  | an all-reduce of ours, FSDP with a sum, or ZeRO's expert groups   |
    | of the others  | mean over dp x ep          | DDP, FSDP or ZeRO                                                 |

A checkpoint written by any of them is read by any other, at any number of ranks.
"""
