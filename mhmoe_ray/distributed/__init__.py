"""Parallelism over ranks: the mesh, expert-parallel dispatch, and strategies for the parameters that all ranks need.

    mesh.py         dp x ep: this rank's process groups
    dispatch/       the all-to-all of rows to the ranks of their experts, and of outputs back
    strategies/     full or sharded parameters: ddp, fsdp, zero
    optimizer.py    AdamW
    rounded_adamw.py   AdamW with moments in bfloat16
    average.py      moving average of the weights
    build.py        build the dispatch and the strategy of a spec

The tables list the storage of each tensor and the reduction of its gradient, by `cluster.strategy`; `shard_experts` is
an option of fsdp. The world size is dp x ep (data-parallel times expert-parallel ranks):

    | tensor         | strategy      | held as                       | in a checkpoint                     |
    | -------------- | ------------- | ----------------------------- | ----------------------------------- |
    | experts        | all           | this rank's E / ep experts    | DTensor over E, Shard(0) on ep      |
    |                | shard_experts | these, each sharded over dp   | DTensor over E, sharded on dp, ep   |
    | all the others | ddp           | whole                         | plain, written once                 |
    |                | fsdp          | a shard over all ranks, or    | DTensor, Shard(0) over these        |
    |                |               | over those of a shard group   |                                     |
    |                | zero1, zero2  | whole; moments (zero2: and    | plain, gathered by DeepSpeed        |
    |                |               | gradients) sharded            |                                     |
    |                | zero3         | a shard; moments and          | plain, gathered by DeepSpeed        |
    |                |               | gradients sharded, too        |                                     |

ZeRO shards a rank's experts in the same way, but only over the dp ranks that hold the same experts.

If several ranks hold the same tensor or shard, the rank with the fewest bytes to write so far writes it
(`checkpoint.save.WriterAssignment`). A checkpoint has no random state, because all draws depend only on the seed and
the number of the micro-batch.

    | gradient       | is                         | reduced by                                                        |
    | -------------- | -------------------------- | ----------------------------------------------------------------- |
    | of experts     | sum over dp / (dp * ep)    | `ExpertReduction`, FSDP with a sum, or ZeRO's expert groups       |
    | of the others  | mean over dp x ep          | DDP, FSDP or ZeRO                                                 |

Each strategy can read the checkpoints of every other one, at any number of ranks.
"""
