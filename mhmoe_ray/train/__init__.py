"""What a Ray Train worker runs, and the driver of the job that starts the workers.

    job.py          the process of a job: that it began, and how it ended
    driver.py       what it does: prepare data, start workers
    resilience.py  Ray Train with a run's own rules
    resilience.py resilience.py driver.py   those: what is tried again, sizes of groups, where the stream begins
    worker.py       one rank: restore, train, validate, save
    resilience.py      that workers find no room, for the record
    watchdog.py     an actor beside the workers that names the one that hangs, and ends it
    worker_failures.py   workers that fail, for the record
    resilience.py   leaving a node that is to be taken away
    driver.py       what a CPU worker's C library is told
    step.py         one optimizer step of M micro-batches
    distributed/optimizer.py    AdamW and its schedule
    worker.py       a fingerprint of what a step read
    distributed/     mesh, exchange of rows, and how ranks hold what all need
    strategies/     how what all ranks need is held: whole, or in slices

    telemetry/      where metrics go

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

Of what several ranks hold, the one that has least to write so far writes it (`runs.tensors.Shares`). Nothing random is
in a checkpoint: all draws are made from the seed and the number of the micro-batch.

    | gradient       | is                         | made whole by                                                     |
    | -------------- | -------------------------- | ----------------------------------------------------------------- |
    | of experts     | sum over dp, over dp * ep  | an all-reduce of ours, FSDP with a sum, or ZeRO's expert groups   |
    | of the others  | mean over dp x ep          | DDP, FSDP or ZeRO                                                 |

A checkpoint written by any of them is read by any other, at any number of ranks.

Every rank reads data of its own, expert-parallel ranks too; a rank's loss is scaled so that these means are the
gradient of the step's loss, whose parts are reduced over the M micro-batches like this:

    | loss           | over a step                                                                                  |
    | -------------- | -------------------------------------------------------------------------------------------- |
    | of tokens      | sum over targets that count, divided by their number; with best-fit packing ranks sum that   |
    |                | number before their first backward, else it is M * b * T                                     |
    | of routing     | mean over micro-batches, each over all its rows, padding included                            |
    | in validation  | sum over held-out targets that count, divided by their number                                |
"""
