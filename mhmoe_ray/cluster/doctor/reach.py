"""The cluster that commands would speak to: whether it answers, to whom, and whether it is of our kind."""

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import version

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection, connect_if_there
from mhmoe_ray.cluster.doctor.finding import Finding
from mhmoe_ray.cluster.nodes import free_nodes
from mhmoe_ray.errors import ClusterError, TokenError

SKEW_SECONDS = 5.0


def reach_findings(address: str | None) -> Iterator[Finding]:
    """Args:
    address: as commands take it.
    """
    try:
        connection = connect_if_there(address)
    except TokenError as e:
        yield Finding("error", "token", f"{e.what}: {e.why}", e.fix)
        return
    except ClusterError as e:
        yield Finding("error", "cluster", f"{e.what}: {e.why}", e.fix)
        return
    if connection is None:
        yield Finding(
            "note", "cluster", "none is named and none runs here", "`mhmoe submit` starts one on this machine"
        )
        return
    yield from _ray_version(connection)
    yield from _openness(connection)
    yield from _clock(connection)
    nodes = free_nodes(connection, None)
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    yield Finding("ok", "nodes", f"{len(nodes)} with {cpus:g} CPUs and {gpus:g} GPUs free")


def _ray_version(connection: Connection) -> Iterator[Finding]:
    theirs, ours = dashboard.ray_version(connection.address, connection.token)["ray_version"], version("ray")
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        yield Finding("ok", "cluster", f"{connection.address}, Ray {theirs}")
    else:
        fix = "install the same minor version on both"
        yield Finding("error", "cluster", f"{connection.address} runs Ray {theirs}, and here is {ours}", fix)


def _openness(connection: Connection) -> Iterator[Finding]:
    token = connection.token
    if token is None or dashboard.is_open(connection.address):
        why = f"{connection.address} takes jobs from whoever reaches it, without a token"
        yield Finding(
            "warning", "token", why, "start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on every node"
        )
    elif connection.address.startswith("http://") and not dashboard.is_loopback(connection.address):
        why = "it is wanted and accepted, but travels there without encryption"
        yield Finding(
            "warning", "token", why, "reach the dashboard through https, or a tunnel: ssh -L 8265:localhost:8265"
        )
    else:
        yield Finding("ok", "token", f"wanted, and that of {token.source} accepted")


def _clock(connection: Connection) -> Iterator[Finding]:
    told = dashboard.date(connection.address, connection.token)
    skew = abs(parsedate_to_datetime(told).timestamp() - time.time()) if told else 0.0
    if skew > SKEW_SECONDS:
        why = f"the head's is {skew:.0f} s from this machine's, which spoils ages in `mhmoe status`"
        yield Finding("warning", "clock", why, "set both by NTP")
    else:
        yield Finding("ok", "clock", "that of the head agrees")
