"""Many runs as one.

    client.py      starting, looking after and stopping a sweep, from outside
    job.py         the job that starts its runs
    scheduler.py   which of them start when

What a sweep is, `spec/sweep.py` says; which runs it comes to, `sweep/plan.py`; its directory is `runs/sweeps.py`.
"""
