"""Training: the driver of a run's job, and the worker that Ray Train runs for each rank.

    job.py               entry point of the job: record that it began, train, record how it ended
    driver.py            prepare the data and start the workers
    stream_start.py      choose the checkpoint, and so the start of the stream, for each worker group
    resilience.py        Ray Train policies of a run: the retry policy, and the number of workers
    preemption.py        preemption of a node: the notice, and the error that ends the worker group
    worker.py            one rank: restore, train, validate, save
    malloc.py            malloc settings of a CPU worker
    step.py              one optimizer step of M micro-batches
    adaptive.py          the adaptive number of experts of a vision model's tasks
    objectives/          what a micro-batch is to the model, its losses, and their validation
    watchdog.py          heartbeats of the ranks, and the actor that kills the process of a rank that hangs
    worker_failures.py   record of failed workers, with the reason
    telemetry/           metrics of a run, and the systems that get them

Every rank reads its own data, also within an expert-parallel group. Each rank scales its loss so that the mean of the
ranks' gradients is the gradient of the step's loss. The parts of that loss are reduced over the M micro-batches like
this:

    | loss           | reduction over a step                                                                        |
    | -------------- | -------------------------------------------------------------------------------------------- |
    | token loss     | sum over counted targets, divided by their number; with best-fit packing ranks sum that      |
    |                | number before their first backward, else it is M * b * T                                     |
    | routing losses | mean over micro-batches, each over all its rows, padding included                            |
    | validation     | sum over counted held-out targets, divided by their number                                   |
    | encoder,       | sum over losses of parts: weight times the mean over all targets of the loss in the step;    |
    |   vision model | the targets of a vision model are images                                                     |

A target counts unless it is padding.
"""
