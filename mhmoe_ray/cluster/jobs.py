"""Ray jobs: submit, inspect, follow and stop them. A cluster that does not answer in time is a ClusterError."""

import functools
import logging
import os
import re
import shlex
import sys
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, TypeVar

from mhmoe_ray.cluster import dashboard, tokens
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import unreachable
from mhmoe_ray.cluster.packages import check_size, with_packages
from mhmoe_ray.errors import JobError, MhmoeError, SpecError
from mhmoe_ray.ray_compat import SDK_LOGGERS, upload_folders

T = TypeVar("T")


@contextmanager
def translated_errors(connection: Connection, subject: str, error_type: type[MhmoeError], fix: str) -> Iterator[None]:
    """Translate errors of Ray's clients into errors of this package.

    A request that the cluster could not serve becomes an `error_type` with Ray's message as its reason, no answer a
    ClusterError, and a refused token a TokenError.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as e:
        raise tokens.refused_token_error(connection.address, connection.token) from e
    except (requests.RequestException, ConnectionError, *dashboard.WRONG_ANSWER) as e:
        raise unreachable(connection.address, e) from e
    except RuntimeError as e:
        raise error_type(subject, failure_reason(str(e)), fix) from e


def failure_reason(text: str) -> str:
    """Return the reason for a failure from Ray's message, as one line of at most 500 characters.

    It is the exception at the end of a traceback, else the last line that is not one of the job's worker processes.
    """
    text = re.sub(r"\x1b\[[0-9;]*m|^Request failed with status code \d+: ", "", text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip(" .")]
    # Ray buffers this line, so it may be the last line in the log of a short job. It is never the reason for a failure.
    lines = [line for line in lines if not line.startswith("Running entrypoint for job ")]
    # If the machine is busy, Ray adds lines of workers, which begin with (NAME pid=N), after the job's own last line.
    lines = [line for line in lines if not re.match(r"\([^()]*\bpid=\d+", line)]
    for i in reversed(range(len(lines))):
        if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)(:|$)", lines[i]):
            # The message of an exception may have several lines, so all lines from the exception on are joined.
            return " ".join(" ".join(lines[i:]).split()).rstrip(".")[:500]
    return lines[-1].strip().rstrip(".")[:500] if lines else "no reason given"


class JobInfo(NamedTuple):
    """Status, message and end time of a Ray job."""

    status: str
    """One of PENDING, RUNNING, SUCCEEDED, FAILED and STOPPED."""
    message: str
    """Ray's own message about the job, as one line, for example why the job could not start."""
    end_time: float
    """End of the job on the head node's clock, in seconds since the epoch; 0 if the job has not ended."""

    @property
    def is_alive(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


def job_request(
    args: Sequence[str],
    submission_id: str,
    *,
    local: bool,
    python: str = "python",
    runtime_env: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the request to Ray Jobs that `submit` sends; no other job of the cluster may have had its `submission_id`.

    `args` are those of the Python interpreter. A job on a cluster that this package started (`local`) runs in the
    interpreter of this process. Elsewhere it runs in `python`, a path or command on the head node, and our packages are
    sent there.
    """
    return {
        "entrypoint": shlex.join([sys.executable if local else python, *args]),
        "submission_id": submission_id,
        "runtime_env": dict(runtime_env or {}) if local else with_packages(runtime_env or {}),
        "metadata": dict(metadata or {}),
    }


def submit(connection: Connection, request: Mapping[str, Any]) -> None:
    """Submit a job; a refused one is a JobError, a wrong or too large runtime environment a SpecError."""
    job = request["submission_id"]
    with translated_errors(connection, f"job {job}", JobError, "see the cluster's dashboard"):
        client = _client(connection)
        uploaded_env = upload_runtime_env(client, request["runtime_env"])
        client.submit_job(**{**request, "runtime_env": uploaded_env})


def upload_runtime_env(client: Any, runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """Upload a runtime environment's local folders, and return it with URIs and the contents of requirements files.

    A wrong or too large environment is a SpecError. `client` is Ray's client of jobs or of Serve.
    """
    from ray.runtime_env import RuntimeEnv

    check_size(runtime_env)
    runtime_env = dict(runtime_env)
    try:
        upload_folders(client, runtime_env)
        return dict(RuntimeEnv(**runtime_env).to_dict())
    except (ValueError, TypeError) as e:
        raise SpecError("cluster.runtime_env", failure_reason(str(e)), "correct it in the spec") from e


def is_alive(connection: Connection, job: str) -> bool:
    """Return whether a job is pending or running; False if the cluster knows no such job."""
    job_info = info(connection, job)
    return job_info is not None and job_info.is_alive


@dashboard.reads_answers
def find_alive(connection: Connection, key: str, value: str) -> str | None:
    """Return the name of a pending or running job with this entry in its metadata; None if there is none."""
    for details in dashboard.get(connection.address, "/api/jobs/", connection.token):
        job_info = _job_info(details)
        # A driver that was not submitted as a job, such as a notebook, has no metadata.
        if job_info.is_alive and (details["metadata"] or {}).get(key) == value:
            return str(details["submission_id"])
    return None


@dashboard.reads_answers
def info(connection: Connection, job: str) -> JobInfo | None:
    """Return the status, message and end time of a job; None if the cluster knows no such job."""
    details = dashboard.get(connection.address, f"/api/jobs/{job}", connection.token, missing_ok=True)
    return None if details is None else _job_info(details)


def _job_info(details: Mapping[str, Any]) -> JobInfo:
    return JobInfo(str(details["status"]), failure_reason(details["message"] or ""), (details["end_time"] or 0) / 1000)


def logs(connection: Connection, job: str) -> str:
    """Return everything that a job's entrypoint has written so far; an unknown job is a JobError."""
    with translated_errors(connection, f"job {job}", JobError, "see `mhmoe list`"):
        return str(_client(connection).get_job_logs(job))


def follow_logs(connection: Connection, job: str) -> Iterator[str]:
    """Yield the lines of a job's log from the first one on until the job ends; an unknown job is a JobError."""
    import aiohttp

    # Ray's dashboard logs the headers of a WebSocket request that it refuses, and these contain the cluster's token.
    # Therefore no such request is sent for an unknown job.
    if info(connection, job) is None:
        raise JobError(f"job {job}", "the cluster does not know it", "see `mhmoe list`")
    client = _client(connection)
    with translated_errors(connection, f"job {job}", JobError, "see `mhmoe list`"):
        try:
            with closing(_items_of_thread(client.tail_job_logs(job))) as chunks:
                yield from dashboard.complete_lines(chunks)
        except aiohttp.WSServerHandshakeError as e:
            if e.status in (401, 403):
                raise tokens.refused_token_error(connection.address, connection.token) from e
            raise RuntimeError(f"the cluster does not know it (status {e.status})") from e
        except aiohttp.ClientError as e:
            raise unreachable(connection.address, e) from e


def _items_of_thread(generator: AsyncGenerator[T]) -> Generator[T]:
    """Yield the items of an asynchronous generator, none of them None, from an event loop of a thread of its own.

    The caller's thread may run an event loop already, as in a notebook. Closing this generator cancels the asynchronous
    one and waits until it has ended.
    """
    import asyncio

    item_queue, loop = SimpleQueue[T | None](), asyncio.new_event_loop()

    async def put_items() -> None:
        async with aclosing(generator):
            async for item in generator:
                item_queue.put(item)

    task = loop.create_task(put_items())

    def run_loop() -> None:
        try:
            with closing(loop):
                # `asyncio.wait` does not raise the task's error. The thread that reads the queue raises it, by
                # `task.result()`.
                loop.run_until_complete(asyncio.wait([task]))
        finally:
            item_queue.put(None)

    # A daemon thread does not keep the process from ending.
    thread = Thread(target=run_loop, name="log", daemon=True)
    thread.start()
    try:
        while (item := item_queue.get()) is not None:
            yield item
        task.result()
    finally:
        # A closed loop raises a RuntimeError. The generator has ended by then, so there is nothing to cancel.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


def stop(connection: Connection, job: str) -> None:
    """Request that a job ends: SIGTERM and, three seconds later, SIGKILL. An unknown job is a JobError."""
    with translated_errors(connection, f"job {job}", JobError, "see `mhmoe list`"):
        _client(connection).stop_job(job)


@functools.cache
def _client(connection: Connection) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in SDK_LOGGERS:  # Ray gives both loggers a level at which they log every upload.
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray's client prefers these two variables to its argument, so they are unset while it is created.
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return JobSubmissionClient(connection.address, headers=connection.headers)
    finally:
        os.environ.update(saved)
