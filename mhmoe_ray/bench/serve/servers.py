"""Servers, whose processes end with the `with` block that starts them."""

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

from mhmoe_ray.bench.serve.engines import NAME, Place
from mhmoe_ray.cluster.local import start_local, stop_local
from mhmoe_ray.cluster.spawn import free_ports
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.api.app import create_app
from mhmoe_ray.serve.load import load_answerer

START_SECONDS = 300

Server = Callable[[Place], AbstractContextManager[str]]
"""Function that starts a server for the length of a `with` block and yields its URL."""


@contextmanager
def alone(engine: str, place: Place) -> Iterator[str]:
    """Run our application without Ray, and yield its URL."""
    spec = place.spec(engine)
    answerer = load_answerer(place.checkpoint, spec)
    [port] = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(create_app(answerer, NAME, spec), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
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
def through_ray(engine: str, place: Place) -> Iterator[str]:
    """Run our application on a local cluster of its own, as `mhmoe serve deploy` does, and yield its URL."""
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.serve.config import application_config

    spec = place.spec(engine).model_copy(update={"port": free_ports(1)[0]})
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as home:
        os.environ["MHMOE_HOME"] = home
        start_local(spec.cpus_per_replica + 1)
        try:
            connection = connect(None)
            serving.deploy(connection, application_config(NAME, place.checkpoint, spec, NAME), spec.host, spec.port)
            serving.wait_until_running(connection, NAME, START_SECONDS)
            yield f"http://{spec.host}:{spec.port}"
        finally:
            stop_local()


@contextmanager
def vllm_server(place: Place) -> Iterator[str]:
    """Run vLLM's own server with its own Mixtral, and yield its URL."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place.folder)]
    command += ["--served-model-name", NAME, "--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
    command += ["--dtype", place.precision, "--max-num-seqs", str(place.most), "--kv-cache-memory-bytes", str(1 << 30)]
    with tempfile.NamedTemporaryFile(prefix="mhmoe-bench-vllm-") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, Path(log.name))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    import requests

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            requests.get(url, timeout=5).raise_for_status()
            return
        except requests.RequestException:
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text().strip().splitlines()[-1:]
                raise ServeError("vLLM's server", f"it did not start: {last}", "see its documentation") from None
            time.sleep(0.5)


SERVERS: dict[str, Server] = {
    "torch, alone": partial(alone, "torch"),
    "torch, Ray Serve": partial(through_ray, "torch"),
    "vllm, alone": partial(alone, "vllm"),
    "vllm, Ray Serve": partial(through_ray, "vllm"),
    "vLLM's server": vllm_server,
}
