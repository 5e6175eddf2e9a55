"""Hook that each interpreter imports at its start, if this folder is on its path; see `harness.disturbing_environment`.

The variable FAILPOINTS is a list in JSON of `[KIND, PATTERN, ERROR, FILE]`: the first operation of a kind on a path
beside `FILE` that matches a pattern fails with an error, or kills its process. `FILE` is created then, so that later
operations succeed in all processes. The variable CLOCK names a file with the number of seconds by which the clock is
wrong. The variable CODE names a folder: when a file with the id of a process appears there, a thread of this process
runs the code in it.
"""

import errno
import json
import os
import signal
import threading
import time
from fnmatch import fnmatchcase
from pathlib import Path

if failpoints := json.loads(os.environ.get("FAILPOINTS", "[]")):
    from tests.support.failpoints import Operation, watched_operations

    create_file = os.open

    def fail_once(operation: Operation) -> None:
        """Let an operation fail if it is the first that a failpoint describes."""
        for kind, pattern, error, file in failpoints:
            if operation.kind == kind and fnmatchcase(str(operation.path), pattern) and not Path(file).exists():
                os.close(create_file(file, os.O_CREAT))
                if error == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                number = getattr(errno, error)
                raise OSError(number, os.strerror(number), str(operation.path))

    watch = watched_operations([Path(file).parent for *_, file in failpoints], fail_once)
    watch.__enter__()  # It never exits, because the process does.

if clock_file := os.environ.get("CLOCK"):
    real_time, real_time_ns, read = time.time, time.time_ns, Path(clock_file).read_bytes
    time.time = lambda: real_time() + int(read())
    time.time_ns = lambda: real_time_ns() + int(read()) * 10**9

if code_folder := os.environ.get("CODE"):

    def run_code() -> None:
        """Wait for the file of this process, and run it."""
        file = Path(code_folder) / str(os.getpid())
        while not file.exists():
            time.sleep(0.05)
        exec(compile(file.read_text(), file, "exec"), {})

    threading.Thread(target=run_code, daemon=True).start()
