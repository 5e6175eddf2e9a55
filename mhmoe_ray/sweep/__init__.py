"""Many runs as one.

    control.py   starting, looking after and stopping a sweep, from outside
    job.py       the job that starts its runs

What a sweep is, `spec/sweep.py` says; which runs it comes to, `planner/sweep.py`; its directory is `runs/sweeps.py`.
"""
