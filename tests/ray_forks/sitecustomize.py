"""Hook that each interpreter imports at its start, if this folder is on its path; see worker_forks.py."""

import sys

if sys.orig_argv[1:] and sys.orig_argv[1].endswith("/ray/_private/workers/setup_worker.py"):
    if sys.orig_argv[2].endswith("/ray/_private/workers/default_worker.py"):
        import worker_forks

        worker_forks.start_worker(sys.orig_argv[2:])
