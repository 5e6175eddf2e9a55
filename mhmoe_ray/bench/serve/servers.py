"""HTTP servers to compare, as context managers; the processes of a server end with the `with` block."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import uvicorn

from mhmoe_ray.bench.serve.engines import MODEL_NAME, ContestModel
from mhmoe_ray.cluster.local import start_local, stop_local
from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.load import load_answerer

START_TIMEOUT = 300
"""Timeout in seconds for the start of a server."""

Server = Callable[[ContestModel], AbstractContextManager[str]]
"""Function that starts a server for the length of a `with` block and yields its URL."""


@contextmanager
def standalone_server(engine: str, served_model: ContestModel) -> Iterator[str]:
    """Run our HTTP application in a thread, without Ray, and yield its URL."""
    spec = served_model.serve_spec(engine)
    answerer = load_answerer(served_model.checkpoint, spec)
    [port] = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(create_app(answerer, MODEL_NAME, spec), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    # If the server cannot start, for example because the port is taken, the thread ends, and the loop must end too.
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        if not server.started:
            raise ServeError("the application", f"it does not listen on port {port}", "try again")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        answerer.engine.close()


@contextmanager
def ray_serve_server(engine: str, served_model: ContestModel) -> Iterator[str]:
    """Run our HTTP application on a local Ray cluster of its own, as `mhmoe serve deploy` does, and yield its URL."""
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.serving.config import application_config

    spec = served_model.serve_spec(engine).model_copy(update={"port": free_ports(1)[0]})
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as home:
        # The cluster gets its own MHMOE_HOME, so that it does not affect the user's local cluster.
        os.environ["MHMOE_HOME"] = home
        start_local(spec.cpus_per_replica + 1)
        try:
            connection = connect(None)
            serving.deploy(
                connection,
                application_config(MODEL_NAME, served_model.checkpoint, spec, MODEL_NAME),
                spec.host,
                spec.port,
            )
            serving.wait_until_running(connection, MODEL_NAME, START_TIMEOUT)
            yield f"http://{spec.host}:{spec.port}"
        finally:
            stop_local()


@contextmanager
def vllm_server(served_model: ContestModel) -> Iterator[str]:
    """Run vLLM's own HTTP server with its own implementation of Mixtral, and yield its URL."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served_model.folder)]
    command += ["--served-model-name", MODEL_NAME, "--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
    command += [
        "--dtype",
        served_model.precision,
        "--max-num-seqs",
        str(served_model.max_requests),
        "--kv-cache-memory-bytes",
        str(1 << 30),
    ]
    with tempfile.NamedTemporaryFile(prefix="mhmoe-bench-vllm-") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, Path(log.name))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    import requests

    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            requests.get(url, timeout=5).raise_for_status()
            return
        # Requests fail until the server has started, so the request is repeated.
        except requests.RequestException:
            if process.poll() is not None or time.monotonic() > deadline:
                last_lines = log.read_text().strip().splitlines()[-1:]
                raise ServeError("vLLM's server", f"it did not start: {last_lines}", "see its documentation") from None
            time.sleep(0.5)


SERVERS: dict[str, Server] = {
    "torch, alone": partial(standalone_server, "torch"),
    "torch, Ray Serve": partial(ray_serve_server, "torch"),
    "vllm, alone": partial(standalone_server, "vllm"),
    "vllm, Ray Serve": partial(ray_serve_server, "vllm"),
    "vLLM's server": vllm_server,
}
