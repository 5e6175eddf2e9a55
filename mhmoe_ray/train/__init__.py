"""What a Ray Train worker runs, and the driver of the job that starts the workers.

    job.py               the process of a job: that it began, and how it ended
    driver.py            what it does: prepare data, start workers
    stream_start.py      where the stream begins, each time that they start
    resilience.py        Ray Train with a run's own rules: what is retried, how many workers
    preemption.py        leaving a node that is to be taken away
    worker.py            one rank: restore, train, validate, save
    malloc.py            what a CPU worker's C library is told
    step.py              one optimizer step of M micro-batches
    watchdog.py          an actor beside the workers that names the one that hangs, and ends it
    worker_failures.py   workers that fail, for the record
    telemetry/           where metrics go

Every rank reads data of its own, expert-parallel ranks too; a rank's loss is scaled so that these means are the
gradient of the step's loss, whose parts are reduced over the M micro-batches like this:

    | loss           | over a step                                                                                  |
    | -------------- | -------------------------------------------------------------------------------------------- |
    | of tokens      | sum over targets that count, divided by their number; with best-fit packing ranks sum that   |
    |                | number before their first backward, else it is M * b * T                                     |
    | of routing     | mean over micro-batches, each over all its rows, padding included                            |
    | in validation  | sum over held-out targets that count, divided by their number                                |
"""
