"""Sweeps: many runs under one name.

    plan.py        the runs of a sweep, as complete specs
    client.py      start, follow and stop a sweep from outside the cluster
    job.py         the job that starts its runs
    scheduler.py   when each of the runs starts

`spec/sweep.py` defines what a sweep is; `runs/sweeps.py` defines its directory.
"""
