"""Sweeps: sets of training runs under one name, which differ in some keys of the spec or in their seeds.

    plan.py        the runs of a sweep, each with its complete spec
    client.py      starts, follows and stops a sweep from outside the cluster
    job.py         the Ray job that starts the runs of a sweep
    scheduler.py   decides when each run of a sweep starts

`spec/sweep.py` defines what a sweep is; `runs/sweeps.py` defines its directory.
"""
