"""Choice of the cluster that a command talks to and of its token, and clusters that the user has given names to.

The names are stored in `clusters.json` in the state folder (tokens.py). Of a token, only the path of its file is
stored.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mhmoe_ray.cluster import dashboard, tokens
from mhmoe_ray.cluster.local import find_local, recorded_address, start_local
from mhmoe_ray.cluster.spawn import LocalCluster
from mhmoe_ray.cluster.tokens import Token, home, locked
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.storage import write_json

FILE = "clusters.json"
LOCAL = "local"
"""Name of the cluster on this machine that this package starts."""
NAME = r"[a-z][a-z0-9-]{0,40}"


@dataclass(frozen=True)
class Context:
    name: str
    address: str
    """URL of the dashboard."""
    token_file: str | None = None
    """Path of the file with the cluster's token; None to send the token that Ray itself would send."""


@dataclass(frozen=True)
class Contexts:
    current: str
    known: dict[str, Context]


def read_contexts() -> Contexts:
    """Read the named clusters and the name of the current one.

    Without a file there are no named clusters, and the local cluster is the current one.

    Raises:
        ClusterError: the file is damaged.
    """
    path = home() / FILE
    if not path.exists():
        return Contexts(LOCAL, {})
    try:
        found = json.loads(path.read_text())
        return Contexts(found["current"], {name: Context(**given) for name, given in found["known"].items()})
    except (ValueError, TypeError, KeyError) as e:
        raise ClusterError(f"file {path}", "it is damaged", "remove it, then `mhmoe cluster use` again") from e


def use(name: str, address: str | None = None, token_file: Path | None = None) -> Context | None:
    """Make this the current cluster, which commands talk to from now on, and return it; None if it is the local one.

    Args:
        name: the name of a known cluster or, together with an address, the name that the cluster gets.
        address: the URL of the cluster's dashboard.
        token_file: the file that holds the cluster's token.

    Raises:
        ClusterError: no cluster of this name is known, the name is not allowed, or the arguments do not fit together.
    """
    with locked():
        before = read_contexts()
        if name == LOCAL:
            if address or token_file:
                raise ClusterError(f"cluster {name}", "that is the one on this machine", "choose another name")
            _write(Contexts(LOCAL, before.known))
            return None
        if address is None:
            if name not in before.known or token_file:
                why = "nothing is known of it" if name not in before.known else "a token alone changes nothing"
                raise ClusterError(f"cluster {name}", why, "give its dashboard: --address http://head:8265")
            context = before.known[name]
        else:
            if not re.fullmatch(NAME, name):
                fix = "use lower-case letters, digits and dashes, a letter first"
                raise ClusterError(f"cluster {name!r}", "that is no name for one", fix)
            context = Context(name, address, str(token_file.absolute()) if token_file else None)
        _write(Contexts(name, before.known | {name: context}))
        return context


def forget(name: str) -> None:
    """Remove a named cluster; if it is the current one, the local cluster becomes current.

    Raises:
        ClusterError: no cluster of this name is known.
    """
    with locked():
        before = read_contexts()
        if name not in before.known:
            raise ClusterError(f"cluster {name}", "nothing is known of it", "see `mhmoe cluster list`")
        known = {n: c for n, c in before.known.items() if n != name}
        _write(Contexts(LOCAL if before.current == name else before.current, known))


def _write(contexts: Contexts) -> None:
    path = home() / FILE
    write_json(path, {"current": contexts.current, "known": {n: asdict(c) for n, c in contexts.known.items()}})
    path.chmod(0o600)


@dataclass(frozen=True)
class Connection:
    address: str
    """URL of the dashboard, without a slash at its end."""
    local: bool
    """Whether this package started the cluster."""
    is_local_machine: bool
    """Whether the cluster has a single node, which is this machine.

    A loopback address alone does not show that, because it may be the end of a tunnel.
    """
    token: Token | None
    ours: LocalCluster | None = None
    """Record of a local cluster; None for other clusters, and in a process that runs within the local cluster
    itself."""

    @property
    def headers(self) -> dict[str, str]:
        return self.token.headers if self.token else {}


def connect(address: str | None = None) -> Connection:
    """Connect to the cluster of this address or name.

    Without one, it is the cluster of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else the one that `mhmoe cluster use`
    chose, else the local cluster.

    Raises:
        ClusterError: the address is malformed, nothing answers there, it is not a Ray dashboard, or no address is given
            and no local cluster runs.
        TokenError: the cluster wants another token.
    """
    connection = connect_if_there(address)
    if connection is None:
        raise ClusterError("local cluster", "none runs", "start it: mhmoe cluster up; or give --address")
    return connection


def connect_if_there(address: str | None = None) -> Connection | None:
    """Connect as `connect` does, but return None if no address is given and no local cluster runs."""
    named, address = _named(address), _chosen(address)
    # The local cluster is looked for where it is meant and nowhere else: it may be another machine's, or not answer.
    ours = find_local() if address is None or _is_ours(address) else None
    if ours:
        return _to_ours(ours)
    if address is None:
        return None
    address = normalised(address)
    token = _token(address, named)
    dashboard.ray_version(address, token)
    return Connection(address, False, dashboard.is_loopback(address) and _is_here(address, token), token)


def each_once() -> Callable[[str], Connection]:
    """Return a variant of `connect` that connects to each address once and repeats its result or its ClusterError."""
    known: dict[str, Connection | ClusterError] = {}

    def connected(address: str) -> Connection:
        if address not in known:
            try:
                known[address] = connect(address)
            except ClusterError as e:
                known[address] = e
        found = known[address]
        if isinstance(found, ClusterError):
            raise found
        return found

    return connected


def start(cpus: int) -> Connection:
    """Connect to the local cluster, and start it with `cpus` logical CPUs if it does not run yet."""
    return _to_ours(start_local(cpus))


def is_local(address: str | None) -> bool:
    """Return whether a command that is given this address would use the local cluster."""
    address = _chosen(address)
    return address is None or _is_ours(address)


def _is_ours(address: str) -> bool:
    return normalised(address) == recorded_address()


def normalised(address: str) -> str:
    """Return the URL of a dashboard in the form in which URLs are compared and stored.

    Raises:
        ClusterError: it is not such a URL.
    """
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


def _chosen(address: str | None) -> str | None:
    """Return the address that an argument, the environment or the current cluster means; None for the local cluster.

    RAY_ADDRESS counts only if it is a URL: it may also name Ray's own port, which is of no use here.
    """
    if address == LOCAL:
        return None
    named = _named(address)
    return named.address if named else _given(address)


def _given(address: str | None) -> str | None:
    ray_address = os.environ.get("RAY_ADDRESS", "")
    fallback = ray_address if ray_address.startswith(("http://", "https://")) else None
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or fallback


def _named(address: str | None) -> Context | None:
    """Return the named cluster that the argument, the environment or the current choice means; None if none is
    meant."""
    contexts = read_contexts()
    return contexts.known.get(_given(address) or contexts.current)


def _token(address: str, named: Context | None) -> Token | None:
    """Return the token for the cluster at this address: from the file that was named for it, else as Ray would.

    Several named clusters may have one address, that of a tunnel: if none of them is meant by its name, the current one
    comes first.
    """
    contexts = read_contexts()
    at_it = {name: c for name, c in contexts.known.items() if normalised(c.address) == address}
    meant = named or at_it.get(contexts.current)
    files = [c.token_file for c in ([meant] if meant else at_it.values()) if c.token_file]
    return tokens.token_in(Path(files[0])) if files else tokens.user_token()


def _to_ours(cluster: LocalCluster) -> Connection:
    return Connection(cluster.address, True, True, tokens.own_token(), cluster)


def _is_here(address: str, token: Token | None) -> bool:
    """Return whether the cluster is a single node, and that node is this machine.

    It is if the node's session folder, whose name is used only once, exists here. A node without CPUs does not count,
    because it is the head of a cluster whose other nodes are yet to join.
    """
    alive, _ = dashboard.nodes(address, token)
    here = os.path.isdir(alive[0].get("sessionDir", "")) if alive else False  # noqa: PTH112 - Path raises if forbidden
    return len(alive) == 1 and here and bool(alive[0]["resourcesTotal"].get("CPU"))
