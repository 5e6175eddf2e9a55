"""What Ray's HTTP clients raise, as our errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mhmoe_ray.cluster import tokens
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import unreachable
from mhmoe_ray.errors import MhmoeError


@contextmanager
def explained(connection: Connection, what: str, failed: type[MhmoeError], fix: str) -> Iterator[None]:
    """Run requests in it; a request that the cluster could not do raises `failed` with what the cluster says.

    Raises:
        ClusterError: the cluster does not answer any more.
        TokenError: it refuses the token.
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
    """What went wrong, in one line: the exception that ends a traceback, else the last line of a message."""
    text = re.sub(r"\x1b\[[0-9;]*m|^Request failed with status code \d+: ", "", text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip(" .")]
    for i in reversed(range(len(lines))):
        if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)(:|$)", lines[i]):
            # Its message may have several lines.
            return " ".join(" ".join(lines[i:]).split()).rstrip(".")[:500]
    return lines[-1].strip().rstrip(".")[:500] if lines else "no reason given"
