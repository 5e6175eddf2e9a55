"""Clusters that the user has given names to, and the one that commands speak to where nothing else is said.

They lie in `clusters.json` of our home. Of a token only the path of its file does.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from mhmoe_ray.cluster.home import home, locked
from mhmoe_ray.errors import ClusterError
from mhmoe_ray.storage import write_json

FILE = "clusters.json"
LOCAL = "local"
"""The name of the cluster on this machine that we start."""
NAME = r"[a-z][a-z0-9-]{0,40}"


@dataclass(frozen=True)
class Context:
    name: str
    address: str
    """The dashboard's URL."""
    token_file: str | None = None
    """With the cluster's token; without one, what Ray itself would send."""


@dataclass(frozen=True)
class Contexts:
    current: str
    known: dict[str, Context]


def read_contexts() -> Contexts:
    """Raises:
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
    """From now on commands speak to this cluster; None where that is the local one.

    Args:
        name: of a cluster that is known, or, with an address, is to be.
        address: the URL of its dashboard.
        token_file: that holds its token.

    Raises:
        ClusterError: it is not known, or cannot be called so.
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
    """Raises:
    ClusterError: nothing is known of it.
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
