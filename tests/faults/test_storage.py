"""A whole run on an object store: it is submitted, disturbed, resumed, inspected and served from there."""

import socket
import subprocess
import threading
import time
from contextlib import suppress
from secrets import token_hex

import pytest

from mhmoe_ray.checkpoint.manifest import uncommitted_checkpoints
from mhmoe_ray.runs.directory import list_runs
from tests.cli.run import command, mhmoe
from tests.faults import harness
from tests.s3 import CREDENTIALS
from tests.watch import is_over, of_kind, step_of, wait_for_the_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def submitted(project, query, steps):
    """Submit a run that is stored on the server; return the run and its storage."""
    storage = f"s3://bucket/{token_hex(3)}?{query}"
    harness.spec_in(project, train={"steps": steps}, cluster={"runtime_env": {"env_vars": CREDENTIALS}})
    result = mhmoe(project, "submit", "spec.yaml", "--set", f"storage={storage}", "--detach")
    assert result.code == 0, result.err
    [run] = list_runs(storage)
    return run, storage


def test_a_run_on_s3_is_stopped_inspected_and_resumed(project, reference, s3):
    query, _ = s3
    run, storage = submitted(project, query, 120)
    harness.workers(run, 1)
    run.stop_file.touch()  # what `mhmoe stop` does, at once
    wait_until(lambda: is_over(run), "its end")
    assert 0 < step_of(run) < 120
    resumed = mhmoe(project, "resume", run.id, "--storage", storage)
    assert resumed.code == 0, resumed.err
    harness.assert_equals_undisturbed_run(run, reference)
    assert "120 of 120" in mhmoe(project, "status", "--storage", storage).out
    assert run.id in mhmoe(project, "list", "--storage", storage).out
    assert mhmoe(project, "ckpt", "verify", run.id, "--storage", storage).code == 0


def test_a_run_on_s3_survives_a_kill_during_an_upload(project, reference, s3):
    query, _ = s3
    run, _ = submitted(project, query, 120)
    worker_pids = harness.workers(run, 1)
    wait_until(lambda: of_kind(run, "checkpoint"), "a checkpoint")
    wait_until(
        lambda: harness.stop_during_checkpoint(run, worker_pids[0]["pid"]), "a checkpoint that is being uploaded"
    )
    assert harness.kill(worker_pids[0]["pid"])
    wait_for_the_end(run)
    harness.assert_equals_undisturbed_run(run, reference)
    assert uncommitted_checkpoints(run) == []


class InterruptibleProxy:
    """Proxy to a server on this machine. It can be closed for some seconds, during which nothing answers."""

    def __init__(self, target_port: int) -> None:
        self._target_port, self._open = target_port, True
        self._connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close_for(self, seconds: float) -> None:
        self._open = False
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._open = True

    def _accept(self) -> None:
        while True:
            client_socket, _ = self._listener.accept()
            if not self._open:
                client_socket.close()
                continue
            server_socket = socket.create_connection(("127.0.0.1", self._target_port))
            self._connections += [client_socket, server_socket]
            for source, target in ((client_socket, server_socket), (server_socket, client_socket)):
                threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_an_unreachable_store_costs_no_step_and_ends_no_follower(project, reference, s3):
    """The store is away for longer than its clients retry by themselves."""
    query, _ = s3
    proxy = InterruptibleProxy(int(query.rpartition(":")[2]))
    run, storage = submitted(project, f"{query.rpartition(':')[0]}:{proxy.port}", 120)
    following = subprocess.Popen(
        command("status", run.id, "--watch", "--storage", storage),
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    harness.workers(run, 1)
    wait_until(lambda: of_kind(run, "checkpoint"), "a checkpoint")
    proxy.close_for(20)
    wait_for_the_end(run)
    harness.assert_equals_undisturbed_run(run, reference)
    out, err = following.communicate(timeout=60)
    assert (following.returncode, "finished" in out.splitlines()[-1]) == (0, True), err
