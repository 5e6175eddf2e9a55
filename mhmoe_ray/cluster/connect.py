"""Connections to clusters: choose the cluster and the token of a command; store clusters that the user has named.

The file `clusters.json` in the state folder (tokens.py) has the names and the paths of token files, but no token.
"""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mhmoe_ray.cluster import dashboard, submissions, tokens
from mhmoe_ray.cluster.local import find_local, recorded_address, start_local
from mhmoe_ray.cluster.spawn import LocalCluster
from mhmoe_ray.cluster.tokens import Token, state_folder, state_lock, write_state
from mhmoe_ray.errors import ClusterError, TokenError
from mhmoe_ray.parsing import parse_object
from mhmoe_ray.ray_compat import RAY_RELEASE, is_tested_release
from mhmoe_ray.storage import read_file

FILE = "clusters.json"
LOCAL = "local"
"""Name of the cluster on this machine that this package starts."""
NAME = r"[a-z][a-z0-9-]{0,40}"


@dataclass(frozen=True)
class NamedCluster:
    """A remote cluster that the user has given a name."""

    name: str
    address: str
    """URL of the cluster's dashboard."""
    token_file: str | None = None
    """Path of the file with the cluster's token; None to send the token that Ray's own tools would send."""


@dataclass(frozen=True)
class NamedClusters:
    """The clusters that the user has named, and the one that commands use by default."""

    current: str
    """Name of the default cluster; `LOCAL` for the local cluster."""
    by_name: dict[str, NamedCluster]


def read_named_clusters() -> NamedClusters:
    """Read the clusters that the user has named and the current one; a damaged file is a ClusterError."""
    path = state_folder() / FILE
    if not path.exists():
        return NamedClusters(LOCAL, {})
    try:
        stored = parse_object(read_file(path))
        by_name = {name: NamedCluster(**fields) for name, fields in stored["known"].items()}
        return NamedClusters(stored["current"], by_name)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ClusterError(f"file {path}", "it is damaged", "remove it, then `mhmoe cluster use` again") from e


def use(name: str, address: str | None = None, token_file: Path | None = None) -> NamedCluster | None:
    """Make a cluster the current one and return it, None for the local one; an `address` names a new cluster."""
    with state_lock():
        clusters = read_named_clusters()
        if name == LOCAL:
            if address or token_file:
                reason = "that is the name of the cluster on this machine"
                raise ClusterError(f"cluster {name}", reason, "choose another name")
            _write(NamedClusters(LOCAL, clusters.by_name))
            return None
        if address is None:
            if name not in clusters.by_name or token_file:
                is_unknown = name not in clusters.by_name
                reason = "there is no cluster of this name" if is_unknown else "a token file alone names no cluster"
                raise ClusterError(
                    f"cluster {name}", reason, "give the address of its dashboard, like http://head:8265"
                )
            cluster = clusters.by_name[name]
        else:
            if not re.fullmatch(NAME, name):
                fix = "use lower-case letters, digits and dashes, a letter first"
                raise ClusterError(f"cluster {name!r}", "the name is not allowed", fix)
            cluster = NamedCluster(name, address, str(token_file.absolute()) if token_file else None)
        _write(NamedClusters(name, clusters.by_name | {name: cluster}))
        return cluster


def forget(name: str) -> None:
    """Remove a named cluster; if it is the current one, the local cluster becomes current."""
    with state_lock():
        clusters = read_named_clusters()
        if name not in clusters.by_name:
            raise ClusterError(f"cluster {name}", "there is no cluster of this name", "see `mhmoe cluster list`")
        remaining = {n: c for n, c in clusters.by_name.items() if n != name}
        _write(NamedClusters(LOCAL if clusters.current == name else clusters.current, remaining))


def _write(clusters: NamedClusters) -> None:
    write_state(FILE, {"current": clusters.current, "known": {n: asdict(c) for n, c in clusters.by_name.items()}})


@dataclass(frozen=True)
class Connection:
    """A cluster that a command talks to: its dashboard, and the token that it accepts."""

    address: str
    """URL of the dashboard, without a slash at its end."""
    local: bool
    """Whether this package started the cluster (the local cluster)."""
    is_local_machine: bool
    """Whether the cluster is this machine alone; a loopback address does not prove it, as it may be a tunnel's end."""
    token: Token | None
    local_cluster: LocalCluster | None = None
    """Record of the local cluster; None for other clusters, and in a process within the local cluster itself."""

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers for Ray's clients, with this connection's token or none."""
        # Without this header, Ray's clients would add the user's token themselves.
        return self.token.headers if self.token else {"Authorization": ""}


def connect(address: str | None = None) -> Connection:
    """Connect to the cluster of this address or name; it has to answer and to accept the token.

    Without an address, the cluster is that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else the one that `mhmoe cluster
    use` chose, else the local cluster. A refused or missing token is a TokenError, any other failure a ClusterError.
    """
    connection = connect_if_running(address)
    if connection is None:
        raise ClusterError("local cluster", "none runs", "start it: mhmoe cluster up; or name a cluster")
    return connection


def connect_recorded(address: str, given_addresses: Collection[str] = ()) -> Connection:
    """Connect to an address that a run or sweep directory records; send the token only if the user knows the address.

    The user knows the addresses of `is_known`; `given_addresses` are further ones, for a job on a cluster, which has no
    such record. Errors are those of `connect`; any other cluster that asks for a token is a TokenError.
    """
    if is_known(address):
        return connect(address)
    url = normalised(address)
    if url in map(normalised, given_addresses):
        return _connection(url, tokens.user_token())
    try:
        return _connection(url, None)
    except TokenError as e:
        reason = "it asks for a token, but only a run directory names its address, so no token is sent"
        raise TokenError(
            e.subject, reason, f"if the cluster is yours, name it: `mhmoe cluster use NAME --address {url}`"
        ) from e


def require_known(address: str) -> str:
    """Return an address from a run directory, to start a job there; one that is not `is_known` is a ClusterError."""
    if is_known(address):
        return address
    reason = "only the run directory names its address"
    raise ClusterError(f"cluster {address}", reason, "if the cluster is yours, give its address as an argument")


def is_known(address: str) -> bool:
    """Return whether an address is of the local or a named cluster, of the environment, or of an earlier command."""
    resolved_address, environment_address = _resolve_address(address), _resolve_address(None)
    if resolved_address is None:
        return True
    url = normalised(resolved_address)
    known_addresses = [cluster.address for cluster in read_named_clusters().by_name.values()]
    known_addresses += [environment_address] if environment_address else []
    return url in map(normalised, known_addresses) or _is_local_cluster(url) or submissions.has_address(url)


def connect_if_running(address: str | None = None) -> Connection | None:
    """Connect as `connect` does, but return None if no address is given and no local cluster runs."""
    named_cluster, address = _find_named_cluster(address), _resolve_address(address)
    # Look for the local cluster only if the command is for it. `find_local` raises an error if the cluster's record is
    # from another machine (on a shared home) or the cluster does not answer, and such an error must not stop commands
    # for a remote cluster.
    local_cluster = find_local() if address is None or _is_local_cluster(address) else None
    if local_cluster:
        return _local_connection(local_cluster)
    if address is None:
        return None
    address = normalised(address)
    connection = _connection(address, _token(address, named_cluster))
    if not is_known(address):
        submissions.record_address(address)
    return connection


def _connection(address: str, token: Token | None) -> Connection:
    """Return the connection to a cluster that this package did not start, after checking that it takes the token."""
    dashboard.ray_version(address, token)
    return Connection(address, False, dashboard.is_loopback(address) and _is_this_machine(address, token), token)


def check_ray_release(connection: Connection) -> str:
    """Return the version of Ray that a cluster runs; one whose minor version is not ours is a ClusterError."""
    release: str = dashboard.ray_version(connection.address, connection.token)["ray_version"]
    if not is_tested_release(release):
        reason = f"it runs Ray {release}, and jobs of mhmoe need {RAY_RELEASE}"
        fix = f"start it with Ray {RAY_RELEASE}, in any patch; or name another cluster"
        raise ClusterError(f"cluster {connection.address}", reason, fix)
    return release


def cached_connect() -> Callable[[str], Connection]:
    """Return a function like `connect_recorded` that tries each address once and repeats its result or ClusterError."""
    results: dict[str, Connection | ClusterError] = {}

    def connect_once(address: str) -> Connection:
        if address not in results:
            try:
                results[address] = connect_recorded(address)
            except ClusterError as e:
                results[address] = e
        result = results[address]
        if isinstance(result, ClusterError):
            raise result
        return result

    return connect_once


def start(cpus: int) -> Connection:
    """Connect to the local cluster; if it does not run, start it with `cpus` logical CPUs first."""
    return _local_connection(start_local(cpus))


def dashboard_command(address: str) -> str:
    """Return the command that opens the dashboard with this URL."""
    default_address = _resolve_address(None) or recorded_address()
    is_default = default_address is not None and normalised(default_address) == address
    return "mhmoe cluster dashboard" if is_default else f"mhmoe cluster dashboard --address {address}"


def uses_local_cluster(address: str | None) -> bool:
    """Return whether a command with this `--address` (None if the option is missing) uses the local cluster."""
    address = _resolve_address(address)
    return address is None or _is_local_cluster(address)


def _is_local_cluster(address: str) -> bool:
    return normalised(address) == recorded_address()


def normalised(address: str) -> str:
    """Return a dashboard's URL with a scheme and without a slash at its end; any other address is a ClusterError."""
    fix = "give the dashboard's URL, like http://host:8265"
    url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        bad = True
    if bad or parts.query or parts.fragment or any(c.isspace() for c in url) or address in ("auto", "local"):
        raise ClusterError(f"address {address!r}", "it is not the URL of a Ray dashboard", fix)
    if parts.username is not None:
        fix = "name a file with the cluster's token in RAY_AUTH_TOKEN_PATH instead"
        raise ClusterError(f"address of {parts.hostname}", "it holds a user name", fix)
    return url


def _resolve_address(address: str | None) -> str | None:
    """Return the address that the argument, environment or current cluster gives; None for the local cluster."""
    if address == LOCAL:
        return None
    named_cluster = _find_named_cluster(address)
    return named_cluster.address if named_cluster else _explicit_address(address)


def _explicit_address(address: str | None) -> str | None:
    """Return `address` or, without one, the cluster's address or name from the environment; None without both."""
    # RAY_ADDRESS may also be the address of Ray's GCS, which does not speak HTTP, so its value is used only if it is a
    # URL.
    ray_address = os.environ.get("RAY_ADDRESS", "")
    fallback = ray_address if ray_address.startswith(("http://", "https://")) else None
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or fallback


def _find_named_cluster(address: str | None) -> NamedCluster | None:
    """Return the named cluster that a command talks to; None for a plain address or the local cluster."""
    clusters = read_named_clusters()
    return clusters.by_name.get(_explicit_address(address) or clusters.current)


def _token(address: str, named_cluster: NamedCluster | None) -> Token | None:
    """Return the token of the cluster at this normalised URL: its token file's, else the one Ray's tools would send."""
    clusters = read_named_clusters()
    same_address = {name: c for name, c in clusters.by_name.items() if normalised(c.address) == address}
    # Several named clusters may have the same address, for example that of a tunnel. If the user gave an address
    # instead of a name, the token of the current cluster takes precedence.
    intended_cluster = named_cluster or same_address.get(clusters.current)
    files = [c.token_file for c in ([intended_cluster] if intended_cluster else same_address.values()) if c.token_file]
    return tokens.token_from_file(Path(files[0])) if files else tokens.user_token()


def _local_connection(cluster: LocalCluster) -> Connection:
    return Connection(cluster.address, True, True, tokens.own_token(), cluster)


def _is_this_machine(address: str, token: Token | None) -> bool:
    alive, _ = dashboard.nodes(address, token)
    # The name of a session folder is unique, so a node whose folder exists here runs here. `os.path.isdir` is used
    # because `Path.is_dir` raises an error if this user has no permission to look.
    has_session_folder = os.path.isdir(alive[0].get("sessionDir", "")) if alive else False  # noqa: PTH112
    # A single node without CPUs is the head of a cluster whose other nodes have yet to join, so it does not count.
    return len(alive) == 1 and has_session_folder and bool(alive[0]["resourcesTotal"].get("CPU"))
