"""Ray jobs: submit, inspect, follow and stop them; and the files that are sent to a cluster with a job."""

import functools
import importlib.util
import logging
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mhmoe_ray.cluster import dashboard, tokens
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import unreachable
from mhmoe_ray.errors import JobError, MhmoeError, SpecError
from mhmoe_ray.ray_compat import SDK_LOGGERS


@contextmanager
def explained(connection: Connection, what: str, failed: type[MhmoeError], fix: str) -> Iterator[None]:
    """Translate errors of Ray's clients in this context: a request that the cluster could not serve raises `failed`.

    Args:
        connection: the cluster that the requests go to.
        what: the thing that the requests are about, for the error.
        failed: the class of the error; its reason is what the cluster reports.
        fix: the remedy, for the error.

    Raises:
        ClusterError: the cluster does not answer any more.
        TokenError: the cluster refuses the token.
    """
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as e:
        raise tokens.refused(connection.address, connection.token) from e
    except (requests.RequestException, ConnectionError) as e:
        raise unreachable(connection.address, e) from e
    except RuntimeError as e:
        raise failed(what, reason(str(e)), fix) from e


def reason(text: str) -> str:
    """Return the reason of a failure in one line: the exception at the end of a traceback, else the last line."""
    text = re.sub(r"\x1b\[[0-9;]*m|^Request failed with status code \d+: ", "", text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip(" .")]
    for i in reversed(range(len(lines))):
        if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)(:|$)", lines[i]):
            # Its message may have several lines.
            return " ".join(" ".join(lines[i:]).split()).rstrip(".")[:500]
    return lines[-1].strip().rstrip(".")[:500] if lines else "no reason given"


NEVER = (".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".*_cache", "*.egg-info", "wandb", "mlruns")
"""Patterns, in the syntax of .gitignore, of files that no job needs; .gitignore and .rayignore files count as well."""
SHOWN = 5


class Shipped(NamedTuple):
    folder: Path
    parts: dict[str, int]
    """Bytes of each file or folder that lies directly in `folder`, the largest first."""

    @property
    def size(self) -> int:
        return sum(self.parts.values())


def shipped(runtime_env: Mapping[str, Any]) -> list[Shipped]:
    """Return the folders of this machine that Ray would send, with the sizes of their parts without excluded files."""
    excludes = list(runtime_env.get("excludes", []))
    places = [runtime_env.get("working_dir"), *runtime_env.get("py_modules", [])]
    folders = [Path(p) for p in places if isinstance(p, str) and "://" not in p and Path(p).is_dir()]
    return [Shipped(folder, _sizes(folder, excludes)) for folder in folders]


def check_size(runtime_env: Mapping[str, Any]) -> None:
    """Check that Ray accepts the size of each folder that the runtime environment sends.

    Raises:
        SpecError: one of the folders is larger than Ray takes; the error names its largest parts.
    """
    from mhmoe_ray.ray_compat import GCS_STORAGE_MAX_SIZE

    for found in shipped(runtime_env):
        if found.size > GCS_STORAGE_MAX_SIZE:
            largest = ", ".join(f"{name} {_mb(each)}" for name, each in list(found.parts.items())[:SHOWN])
            sizes = f"{_mb(found.size)}, and Ray sends at most {_mb(GCS_STORAGE_MAX_SIZE)}"
            why = f"{found.folder} has {sizes}; largest: {largest}"
            fix = "leave things out by `excludes` of cluster.runtime_env or a .rayignore, or name a smaller folder"
            raise SpecError("cluster.runtime_env", why, fix)


def _sizes(folder: Path, excludes: list[str]) -> dict[str, int]:
    from mhmoe_ray.ray_compat import _get_excludes

    count: Counter[str] = Counter()
    for path in _files(folder, [_get_excludes(folder, excludes)]):
        count[path.relative_to(folder).parts[0]] += path.stat().st_size
    return dict(count.most_common())


def _files(folder: Path, left_out: list[Any]) -> Iterator[Path]:
    from mhmoe_ray.ray_compat import get_excludes_from_ignore_files

    left_out = left_out + get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_Silent())
    for path in sorted(folder.iterdir()):
        if any(leaves_out(path) for leaves_out in left_out):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path, left_out)
        elif path.is_file():
            yield path


class _Silent:
    def info(self, *_: object) -> None:
        """Drop Ray's message about each file of exclude patterns."""


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


PACKAGES = ("mhmoe_ray", "mhmoe_kernels")


class JobInfo(NamedTuple):
    status: str
    """One of PENDING, RUNNING, SUCCEEDED, FAILED and STOPPED."""
    message: str
    """Ray's own message on the job in one line."""
    ended: float
    """Time at which the job ended, in seconds since the epoch by the clock of the head node; 0 if it has not ended."""

    @property
    def is_alive(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


def request(
    args: Sequence[str],
    submission_id: str,
    *,
    local: bool,
    python: str = "python",
    runtime_env: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return exactly the request that `submit` sends.

    Args:
        args: the arguments of the Python interpreter, for example ["-m", "mhmoe_ray.train.job", "tiny-3f2a1c-1"].
        submission_id: the job's name on the cluster; never used twice.
        local: whether this package started the cluster (`Connection.local`). If so, the job runs in this very Python
            interpreter; on another cluster it runs in `python`, and our packages are sent there.
        python: the interpreter on the head node of another cluster, as its shell takes it.
        runtime_env: Ray's runtime environment of the job.
        metadata: strings that are kept with the job.
    """
    return {
        "entrypoint": shlex.join([sys.executable if local else python, *args]),
        "submission_id": submission_id,
        "runtime_env": dict(runtime_env or {}) if local else with_packages(runtime_env or {}),
        "metadata": dict(metadata or {}),
    }


def with_packages(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """Return the runtime environment with the folders of our packages, for a cluster that has not installed them."""
    folders = []
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        assert found is not None
        assert found.origin is not None
        folders.append(str(Path(found.origin).parent))
    modules = [*runtime_env.get("py_modules", []), *folders]
    excludes = [*runtime_env.get("excludes", []), *NEVER]
    return {**runtime_env, "py_modules": modules, "excludes": excludes}


def submit(connection: Connection, request: Mapping[str, Any]) -> None:
    """Submit a job to the cluster, where it runs independently of this process.

    Raises:
        JobError: the cluster does not accept the job.
        SpecError: the runtime environment is not one that Ray knows, or sends more than Ray takes.
    """
    job = request["submission_id"]
    check_size(request["runtime_env"])
    with explained(connection, f"job {job}", JobError, "see the cluster's dashboard"):
        client = _client(connection)
        try:
            client.submit_job(**request)
        except (ValueError, TypeError) as e:
            raise SpecError("cluster.runtime_env", reason(str(e)), "correct it in the spec") from e


def status(connection: Connection, job: str) -> str | None:
    """Return the status of a job as in `JobInfo.status`; None if the cluster knows no such job.

    Raises:
        ClusterError: there is no answer in time, or none at all.
    """
    found = info(connection, job)
    return found.status if found else None


def is_alive(connection: Connection, job: str) -> bool:
    """Return whether a job is pending or running; False if the cluster knows no such job.

    Raises:
        ClusterError: in the same cases as `status`.
    """
    found = info(connection, job)
    return found is not None and found.is_alive


def message(connection: Connection, job: str) -> str:
    """Return Ray's own message on the job in one line, for example why it could not start.

    If the cluster knows no such job, the line says so.
    """
    found = info(connection, job)
    return found.message if found else "the cluster does not know this job"


def info(connection: Connection, job: str) -> JobInfo | None:
    """Return the status, message and end time of a job; None if the cluster knows no such job.

    Raises:
        ClusterError: in the same cases as `status`.
    """
    told = dashboard.get(connection.address, f"/api/jobs/{job}", connection.token, missing_ok=True)
    if told is None:
        return None
    return JobInfo(str(told["status"]), reason(told["message"] or ""), (told["end_time"] or 0) / 1000)


def logs(connection: Connection, job: str) -> str:
    """Return everything that the job's entrypoint has written so far.

    Raises:
        JobError: the cluster knows no such job.
    """
    with explained(connection, f"job {job}", JobError, "see `mhmoe list`"):
        return str(_client(connection).get_job_logs(job))


def follow_logs(connection: Connection, job: str) -> Iterator[str]:
    """Yield the lines of the job's log from the first one on, as they arrive, until the job ends.

    Raises:
        JobError: the cluster knows no such job.
        ClusterError: the cluster does not answer any more.
    """
    import asyncio

    import aiohttp

    client = _client(connection)
    with asyncio.Runner() as runner, explained(connection, f"job {job}", JobError, "see `mhmoe list`"):
        chunks = client.tail_job_logs(job)

        async def following() -> str | None:
            return await anext(chunks, None)

        rest = ""
        try:
            while (chunk := runner.run(following())) is not None:
                *lines, rest = (rest + chunk).split("\n")
                yield from lines
        except aiohttp.WSServerHandshakeError as e:
            if e.status in (401, 403):
                raise tokens.refused(connection.address, connection.token) from e
            raise RuntimeError(f"the cluster does not know it (status {e.status})") from e
        except aiohttp.ClientError as e:
            raise unreachable(connection.address, e) from e
        finally:
            runner.run(chunks.aclose())
        if rest:
            yield rest


def stop(connection: Connection, job: str) -> None:
    """Ask the job to end and return at once: all its processes get SIGTERM and, three seconds later, SIGKILL.

    Raises:
        JobError: the cluster knows no such job.
    """
    with explained(connection, f"job {job}", JobError, "see `mhmoe list`"):
        _client(connection).stop_job(job)


@functools.cache
def _client(connection: Connection) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in SDK_LOGGERS:  # these set levels of their own and tell of every upload
        logging.getLogger(name).setLevel(logging.WARNING)
    # These two would take precedence over the address given.
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return JobSubmissionClient(connection.address, headers=connection.headers)
    finally:
        os.environ.update(saved)
