"""What a Ray Train worker runs, and the driver of the job that starts the workers.

    driver.py       the job: prepare data, start workers, say how it ended
    worker.py       one rank: restore, train, validate, save
    memory.py       what a CPU worker's C library is told
    step.py         one optimizer step of M micro-batches
    mesh.py dispatch.py gradients.py    dp x ep: groups, exchange of rows, reduction and clipping
    state.py        the tensors of a checkpoint, saved and restored

How each tensor is held and its gradient made whole, for world = dp x ep:

    | tensor         | held as                    | in a checkpoint                | gradient                        |
    | -------------- | -------------------------- | ------------------------------ | ------------------------------- |
    | experts        | this rank's E / ep experts | DTensor over E, Shard(0) on ep | sum over dp, divided by dp * ep |
    | all the others | replicated                 | plain, written once            | mean over dp x ep (torch's DDP) |

Every rank reads data of its own, expert-parallel ranks too; a rank's loss is scaled so that these means are the
gradient of the step's loss, whose parts are reduced over the M micro-batches like this:

    | loss           | over a step                                                                                  |
    | -------------- | -------------------------------------------------------------------------------------------- |
    | of tokens      | sum over targets that count, divided by their number; with best-fit packing ranks sum that   |
    |                | number before their first backward, else it is M * b * T                                     |
    | of routing     | mean over micro-batches, each over all its rows, padding included                            |
    | in validation  | sum over held-out targets that count, divided by their number                                |
"""
