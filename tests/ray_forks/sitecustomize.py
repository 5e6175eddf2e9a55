"""Hook that each interpreter imports at its start, if this folder is on its path; see worker_forks.py."""

import sys

# Ray's Python scripts for a worker: one sets up its environment, and then runs the other.
SCRIPTS = ["setup_worker.py", "default_worker.py"]

if [word.rpartition("/ray/_private/workers/")[2] for word in sys.orig_argv[1:3]] == SCRIPTS:
    import worker_forks

    worker_forks.start_worker(sys.orig_argv[2:])
