"""Training: the driver of a run's Ray job, and the worker that Ray Train runs for each rank.

    job.py               entry point of the job: record that it began, train, record how it ended
    driver.py            prepare the data and start the workers
    repetition.py        job that repeats the last steps of a run and compares them
    stream_start.py      choose the checkpoint, and so the start of the stream, for each worker group
    resilience.py        Ray Train policies of a run: retries after failures, and the number of workers
    placement.py         nodes of the workers, planned at each start
    preemption.py        preemption of a node: the notice, and the error that ends the worker group
    worker.py            one rank: restore, train, validate, save
    rendezvous.py        store at rank 0 by which the ranks learn each other's addresses
    malloc.py            settings of malloc for a worker on CPUs
    step.py              one optimizer step of M micro-batches
    objectives/          training objectives: the model's input from a micro-batch, the losses, and validation
    watchdog.py          heartbeats of the ranks, and the actor that kills the process of a rank that hangs
    hangs.py             who waits for whom in a hang, and the stacks of a process
    profile.py           profiles of steps: traces, and the time of each part
    spikes.py            spikes of the loss or the gradient norm, whose updates are skipped
    stragglers.py        ranks that are slower than the others
    worker_failures.py   record of failed workers, with the reason
    telemetry/           metrics of a run, and the systems that get them

Every rank reads its own data, even within an expert-parallel group. Each rank scales its loss so that the mean of the
ranks' gradients is the gradient of the step's loss. The losses are reduced over the M micro-batches of a step like
this (b samples of T tokens each):

    | loss           | reduction over a step                                                                        |
    | -------------- | -------------------------------------------------------------------------------------------- |
    | token loss     | sum over targets that count, divided by their number; with best-fit packing ranks sum that   |
    |                | number before their first backward, else it is M * b * T                                     |
    | routing losses | mean over micro-batches, each over all its rows, padding included                            |
    | validation     | sum over held-out targets that count, divided by their number                                |
    | encoder,       | sum over all losses of the micro-batch's parts (`data.parts`): weight times the mean over    |
    |   vision model | all targets of the loss in the step; the targets of a vision model are images                |

Targets do not count if they are padding, or if the model only reads them, like the question in a chat.
"""
