"""Fork server for the workers of Ray in tests.

A short run starts a dozen workers, each of which spends nearly all of its time with imports. Here the first worker of a
job becomes a server: it imports the large modules, and forks for itself and for each later worker of its job. A worker
whose runtime environment changes how an interpreter starts has an interpreter of its own.

Forked workers share the seed of Python's hashes and the modules that their server has imported. Without the option
`--forks`, all workers start as users' workers do.
"""

import argparse
import json
import os
import random
import runpy
import signal
import socket
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODULES = ("ray.data", "ray.train")
"""Modules that a server imports at its start."""
TRAINING_MODULES = ("ray.train.torch", "mhmoe_ray.train.worker")
"""Modules that it imports before it forks the first worker that trains."""
TRAINING_VARIABLE = "MALLOC_ARENA_MAX"
"""Environment variable that only workers that train have."""
IDLE_SECONDS = 20.0
"""Seconds without a request after which a server ends. Later workers of its job start another one."""


def start_worker(words: list[str]) -> None:
    """Have the worker of Ray with these words of its command line forked, and end this process.

    Return if the worker needs an interpreter of its own, which this one then becomes.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    options, worker_words = parser.parse_known_args(words)
    context = json.loads(options.serialized_runtime_env_context)
    if options.language != "PYTHON" or needs_interpreter(context):
        return
    [raylet_name] = (word for word in worker_words if word.startswith("--raylet-name="))
    environment = {**os.environ, **(context.get("env_vars") or {})}
    request = json.dumps({"words": worker_words, "environment": environment, "folder": str(Path.cwd())}).encode()
    # Each job has a server of its own, because Ray reads the job's id when it is imported. A name that begins with a
    # zero byte is not that of a file, and ends with its server.
    address = f"\0{raylet_name} {os.environ.get('RAY_JOB_ID')}"
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(address)
                connection.sendall(len(request).to_bytes(4, "big"))
                socket.send_fds(connection, [request], [0, 1, 2])
                if connection.recv(1):
                    os._exit(0)
            # The server that has this address may end at any moment.
            except ConnectionRefusedError:
                become_server(address, request.decode())
            except ConnectionError:
                pass


def needs_interpreter(context: dict[str, Any]) -> bool:
    """Return whether the runtime environment of a worker changes how its interpreter starts or what it imports."""
    folders = (context.get("env_vars") or {}).get("PYTHONPATH", "").split(os.pathsep)
    return bool(
        context.get("command_prefix")
        or context.get("override_worker_entrypoint")
        or context.get("py_executable") not in (None, sys.executable)
        or any(folder and Path(folder) != ROOT for folder in folders)
    )


def become_server(address: str, request: str) -> None:
    """Replace this process by the server at an address, whose first worker has this request.

    Return if another process has become that server.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address)
        except OSError:
            return
        listener.listen(64)
        os.set_inheritable(listener.fileno(), True)
        # OpenMP reads the variable when torch is imported. Ray sets it to the CPUs of a task, which are mostly 1.
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, __file__, str(listener.fileno()), request])


def serve(listener: socket.socket, first_request: str) -> None:
    """Fork a worker for each request; end when there have been none for a while. Only workers return."""
    import_modules(MODULES)
    # The system then removes ended workers at once. Otherwise they would stay as zombies, as nobody waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if not os.fork():
        # The address is in use as long as any process has the listener.
        listener.close()
        return become_worker(json.loads(first_request))
    listener.settimeout(IDLE_SECONDS)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            os._exit(0)
        with connection:
            connection.settimeout(None)
            size = int.from_bytes(connection.recv(4), "big")
            content, files, _, _ = socket.recv_fds(connection, size, 3)
            while len(content) < size:
                content += connection.recv(size - len(content))
            request = json.loads(content)
            if TRAINING_VARIABLE in request["environment"]:
                import_modules(TRAINING_MODULES)
            if not os.fork():
                listener.close()
                connection.close()
                for number, file in enumerate(files):
                    os.dup2(file, number)
                return become_worker(request)
            connection.sendall(b"1")
        for file in files:
            os.close(file)


def import_modules(names: Iterable[str]) -> None:
    for name in names:
        import_module(name)


def become_worker(request: dict[str, Any]) -> None:
    """Give this forked process what a new interpreter would have, for the worker with this request."""
    import numpy as np

    # Ray kills the process group of a worker that ends.
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server_folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    other_folders = [folder for folder in sys.path[1:] if folder not in server_folders]
    os.environ.clear()
    os.environ |= request["environment"]
    os.chdir(request["folder"])
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = request["words"]
    sys.path[:] = [str(Path(sys.argv[0]).parent), *filter(None, folders), *other_folders]
    random.seed()
    np.random.seed()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    runpy.run_path(sys.argv[0], run_name="__main__")
