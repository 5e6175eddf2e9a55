"""Training: the driver of a run's job, and the worker that Ray Train runs for each rank.

    job.py               entry point of the job: record that it began, train, record how it ended
    driver.py            prepare the data and start the workers
    stream_start.py      choose the checkpoint, and so the start of the stream, for each worker group
    resilience.py        Ray Train policies of a run: which failures are retried, how many workers there are
    preemption.py        leave a node that is about to be taken away
    worker.py            one rank: restore, train, validate, save
    malloc.py            malloc settings of a CPU worker
    step.py              one optimizer step of M micro-batches
    watchdog.py          an actor beside the workers that finds the one that hangs and kills its process
    worker_failures.py   record which worker failed, and why
    telemetry/           metrics of a run and where they are sent

Every rank reads its own data, also within an expert-parallel group. Each rank scales its loss so that the mean of the
ranks' gradients is the gradient of the step's loss. The parts of that loss are reduced over the M micro-batches like
this:

    | loss           | reduction over a step                                                                        |
    | -------------- | -------------------------------------------------------------------------------------------- |
    | token loss     | sum over counted targets, divided by their number; with best-fit packing ranks sum that      |
    |                | number before their first backward, else it is M * b * T                                     |
    | routing losses | mean over micro-batches, each over all its rows, padding included                            |
    | validation     | sum over counted held-out targets, divided by their number                                   |

A target counts unless it is padding.
"""
