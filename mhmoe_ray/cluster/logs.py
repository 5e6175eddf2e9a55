"""What single processes of a cluster wrote, as its dashboard gives their files."""

from collections.abc import Iterator
from urllib.parse import urlencode

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import JobError

MARKS = (":job_id:", ":actor_name:", ":task_name:")
"""Lines of Ray's own, which tell it whose the next ones are."""
EVERYTHING = 1_000_000_000
"""Lines: more than any log has."""


def process_log(connection: Connection, node: str, pid: int, kind: str, *, follow: bool = False) -> Iterator[str]:
    """Lines of a worker's file.

    Args:
        connection: the cluster.
        node: id of the node that the process runs or ran on.
        pid: of the process.
        kind: "err" or "out".
        follow: go on with new lines, for ever.

    Raises:
        JobError: the node is gone, or keeps no such file.
    """
    asked = {
        "node_id": node,
        "pid": pid,
        "suffix": kind,
        "lines": EVERYTHING,
        "timeout": 10,
        "filter_ansi_code": "true",
    }
    path = f"/api/v0/logs/{'stream' if follow else 'file'}?{urlencode(asked)}"
    with dashboard.streamed(connection.address, path, connection.token) as (status, chunks):
        if status != 200:
            what, fix = (
                f"log of process {pid}",
                "see `mhmoe status`, which keeps the last lines of a worker that failed",
            )
            raise JobError(what, "its node is gone, or keeps it no longer", fix)
        for line in _lines(chunks):
            if not line.startswith(MARKS):
                yield line


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace").rstrip("\r") for line in lines)
    if rest:
        yield rest.decode(errors="replace")
