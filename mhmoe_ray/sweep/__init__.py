"""Many runs as one.

    plan.py        the runs of a sweep, as whole specs
    client.py      starting, looking after and stopping a sweep, from outside
    job.py         the job that starts its runs
    scheduler.py   which of them start when

What a sweep is, `spec/sweep.py` says; its directory is `runs/sweeps.py`.
"""
