"""Fork servers for the workers of Ray in tests.

A short run starts a dozen workers, each of which spends nearly all of its time with imports. Here the first worker of a
node becomes the node's server, which imports the large modules other than Ray. For each job it forks a server of the
job, which imports Ray and forks the workers of this job. A worker whose runtime environment changes how an interpreter
starts has an interpreter of its own.

Forked workers share the seed of Python's hashes and the modules that their servers have imported. Without the option
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
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
NODE_MODULES = (
    *("boto3", "jinja2", "pandas", "pyarrow.dataset", "pydantic", "requests", "tensorboardX"),
    *("torch", "torch.distributed.fsdp"),
    *("mhmoe_ray.checkpoint.load", "mhmoe_ray.checkpoint.save", "mhmoe_ray.families.encoder.model.encoder"),
)
"""Modules without Ray that a node's server imports at its start."""
JOB_MODULES = ("ray.data", "ray.train")
"""Modules that a job's server imports at its start."""
TRAINING_MODULES = ("ray.train.torch", "mhmoe_ray.train.worker")
"""Modules that a job's server imports before it forks the first worker that trains."""
TRAINING_VARIABLE = "MALLOC_ARENA_MAX"
"""Environment variable that only workers that train have."""
IDLE_SECONDS = 20
"""Seconds without a request after which a job's server ends. Later workers of its job start another one."""
POLL_SECONDS = 2
"""Seconds between two checks whether the parent of a server has ended: the raylet, or the node's server."""
INTERPRETER_FOLDERS = os.environ.get("PYTHONPATH", "").split(os.pathsep)
"""Folders that this interpreter was started with."""


def start_worker(words: list[str]) -> None:
    """Let a server fork the Ray worker that this process was started to be, and end this process.

    Return if the worker needs an interpreter of its own: then this process becomes the worker.

    Args:
        words: the words of the worker's command line.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    options, worker_words = parser.parse_known_args(words)
    context = json.loads(options.serialized_runtime_env_context)
    if options.language != "PYTHON" or needs_interpreter(context):
        return
    [raylet_path] = (word.partition("=")[2] for word in worker_words if word.startswith("--raylet-name="))
    # The sockets are beside the raylet's, in a folder that other users cannot enter. Each job has a server of its own,
    # because Ray reads the job's id when it is imported.
    node_address = f"{raylet_path}.forks"
    job_address = f"{node_address}.{os.environ.get('RAY_JOB_ID')}"
    environment = {**os.environ, **(context.get("env_vars") or {})}
    request = json.dumps(
        {"words": worker_words, "environment": environment, "folder": str(Path.cwd()), "job_address": job_address}
    )
    while True:
        # A server may end at any moment, and another process may become the server of the same address.
        if send(request, job_address) or send(request, node_address):
            os._exit(0)
        become_node_server(node_address, request)


def needs_interpreter(context: dict[str, Any]) -> bool:
    """Return whether the runtime environment of a worker changes how its interpreter starts or what it imports."""
    folders = (context.get("env_vars") or {}).get("PYTHONPATH", "").split(os.pathsep)
    return bool(
        context.get("command_prefix")
        or context.get("override_worker_entrypoint")
        or context.get("py_executable") not in (None, sys.executable)
        or any(folder and Path(folder) != ROOT for folder in folders)
    )


def send(request: str, address: str) -> bool:
    """Send a request and this process's standard streams to a server; return whether it has accepted the request."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            connection.sendall(len(request.encode()).to_bytes(4, "big"))
            socket.send_fds(connection, [request.encode()], [0, 1, 2])
            return bool(connection.recv(1))
        except ConnectionRefusedError:
            # The server was killed, and could not remove its socket.
            Path(address).unlink(missing_ok=True)
            return False
        except (ConnectionError, FileNotFoundError):
            return False


def listen(address: str) -> socket.socket | None:
    """Return a socket that listens at an address; None if another process has that address."""
    listener, own_path = socket.socket(socket.AF_UNIX), Path(f"{address}.{os.getpid()}")
    listener.bind(str(own_path))
    listener.listen(64)
    try:
        # A link appears together with its listener. After `bind` alone, a connection would be refused for a moment.
        os.link(own_path, address)
    except FileExistsError:
        listener.close()
        return None
    finally:
        own_path.unlink()
    return listener


def become_node_server(address: str, request: str) -> None:
    """Replace this process by the node's server, whose first request is `request`.

    Return if another process has become that server.
    """
    listener = listen(address)
    if listener is None:
        return
    os.set_inheritable(listener.fileno(), True)
    # OpenMP reads the variable when torch is imported. Ray sets it to the CPUs of a task, which are mostly 1.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.execv(sys.executable, [sys.executable, __file__, str(listener.fileno()), request])


def serve_node(listener: socket.socket, first_request: str) -> None:
    """Fork a server for each job until the raylet ends. The call returns only in forked workers."""
    raylet = os.getppid()
    import_modules(NODE_MODULES)
    # The system then removes ended processes at once. Otherwise they would stay as zombies, as nobody waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if not os.fork():
        # The address is in use as long as any process has the listener.
        listener.close()
        serve_job(json.loads(first_request))
        return
    for connection in connections(listener, raylet):
        request, files = receive(connection)
        if not os.fork():
            listener.close()
            replace_streams(files)
            serve_job(request, connection)
            return
        close(connection, files)
    os._exit(0)


def serve_job(first_request: dict[str, Any], connection: socket.socket | None = None) -> None:
    """Fork a worker for each request, until there have been none for a while. The call returns only in the workers.

    Args:
        first_request: the request of the first worker.
        connection: the connection to the process that sent the request and waits for an answer; None if none waits.
    """
    node_server = os.getppid()
    listener = listen(first_request["job_address"])
    if listener is None:
        # Another process has become the server of this job in the meantime, and takes the request.
        if send(json.dumps(first_request), first_request["job_address"]) and connection is not None:
            connection.sendall(b"1")
        os._exit(0)
    if connection is not None:
        connection.sendall(b"1")
        connection.close()
    os.environ.clear()
    os.environ |= first_request["environment"]
    import_ray_modules(JOB_MODULES)
    if not os.fork():
        listener.close()
        become_worker(first_request)
        return
    for worker_connection in connections(listener, node_server, IDLE_SECONDS):
        request, files = receive(worker_connection)
        if TRAINING_VARIABLE in request["environment"]:
            import_ray_modules(TRAINING_MODULES)
        if not os.fork():
            listener.close()
            worker_connection.close()
            replace_streams(files)
            become_worker(request)
            return
        worker_connection.sendall(b"1")
        close(worker_connection, files)
    Path(first_request["job_address"]).unlink(missing_ok=True)
    os._exit(0)


def connections(listener: socket.socket, parent: int, idle_seconds: float = float("inf")) -> Iterator[socket.socket]:
    """Yield connections until the parent of this process has ended, or `idle_seconds` pass without a connection."""
    idle_time = 0.0
    while os.getppid() == parent and idle_time < idle_seconds:
        listener.settimeout(POLL_SECONDS)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            idle_time += POLL_SECONDS
            continue
        idle_time = 0
        connection.settimeout(None)
        yield connection


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return the request that a process sends over a connection, and descriptors of its standard streams."""
    size = int.from_bytes(connection.recv(4), "big")
    content, files, _, _ = socket.recv_fds(connection, size, 3)
    while len(content) < size:
        content += connection.recv(size - len(content))
    return json.loads(content), files


def replace_streams(files: list[int]) -> None:
    """Make these descriptors the standard streams of this process."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


def close(connection: socket.socket, files: list[int]) -> None:
    connection.close()
    for file in files:
        os.close(file)


def import_modules(names: Iterable[str]) -> None:
    for name in names:
        import_module(name)


def import_ray_modules(names: Iterable[str]) -> None:
    """Import modules of Ray, or that import Ray, without drawing random numbers from the generator of Ray's C++.

    Forked processes would share the state of this generator, and give equal ids to different tasks. Ray draws from it
    for the id of each class of actors, even while Ray is imported.
    """
    import ray.actor

    class_id = ray.actor.ActorClassID
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: class_id(os.urandom(class_id.size())))
    try:
        import_modules(names)
    finally:
        ray.actor.ActorClassID = class_id


def become_worker(request: dict[str, Any]) -> None:
    """Set up this forked process like a new interpreter that Ray starts for the worker of this request."""
    import numpy as np

    # Ray kills the process group of a worker that ends.
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    other_folders = [folder for folder in sys.path[1:] if folder not in INTERPRETER_FOLDERS]
    os.environ.clear()
    os.environ |= request["environment"]
    os.chdir(request["folder"])
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = request["words"]
    sys.path[:] = [str(Path(sys.argv[0]).parent), *filter(None, folders), *other_folders]
    random.seed()
    np.random.seed()


if __name__ == "__main__":
    serve_node(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
    runpy.run_path(sys.argv[0], run_name="__main__")
