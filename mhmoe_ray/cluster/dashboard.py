"""HTTP requests to a Ray dashboard: each failure becomes a one-line error, and a busy dashboard can be asked again."""

import functools
import ipaddress
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from mhmoe_ray.cluster.tokens import Token, refused_token_error
from mhmoe_ray.errors import ClusterError, StorageError, TokenError
from mhmoe_ray.parsing import parse_json

P = ParamSpec("P")
T = TypeVar("T")
SECONDS = 60.0
"""Seconds without any answer after which a server counts as gone."""


WRONG_ANSWER = (LookupError, TypeError, ValueError, AttributeError)
"""Errors of code that reads an answer which lacks an entry, or has one of another type than Ray's."""


class RetryingCaller:
    """Caller for loops that repeat a request: it tolerates up to `SECONDS` without an answer, and warns once.

    An endless one has no timeout; it is for clients whose own end would stop the jobs they watch.
    """

    def __init__(self, say: Callable[[str], object], *, is_endless: bool = False) -> None:
        self._say, self._is_endless = say, is_endless
        self._unanswered_since: float | None = None

    def call(self, request: Callable[[], T], default: T) -> T:
        """Return the result of a request, or `default` if the request gets no answer now.

        After `SECONDS` without an answer it raises the ClusterError or StorageError, and a TokenError at once.
        """
        try:
            answer = request()
        except TokenError:
            # There is no retry, because it would send the same refused token again.
            raise
        except (ClusterError, OSError, StorageError) as e:
            if self._unanswered_since is None:
                self._unanswered_since = time.monotonic()
                self._say(f"still following, but {e}")
            elif time.monotonic() - self._unanswered_since > SECONDS and not self._is_endless:
                if isinstance(e, OSError):
                    raise StorageError("storage", str(e), "repair it, then give the command again") from e
                raise
            return default
        self._unanswered_since = None
        return answer


def get(address: str, path: str, token: Token | None, *, missing_ok: bool = False, seconds: float = 10) -> Any:
    """Request a path of the dashboard, and return the JSON of its answer; None for a 404 that `missing_ok` allows.

    The answer has to come within `seconds`. A refused or missing token is a TokenError; no answer, or one that is not a
    Ray dashboard's, is a ClusterError.
    """
    import requests  # type: ignore[import-untyped, unused-ignore]  # typed where types-requests is

    keep_off_proxies(address)
    headers, result = token.headers if token else {}, Future[Any]()

    def request() -> None:
        try:
            result.set_result(requests.get(address + path, headers=headers, timeout=(10, seconds)))
        except Exception as e:
            result.set_exception(e)

    # The thread can be left behind. The timeout of `requests` alone begins anew with each byte that arrives.
    Thread(target=request, daemon=True).start()
    try:
        answer = result.result(seconds)
    except (requests.RequestException, TimeoutError) as e:
        raise unreachable(address, e) from e
    if answer.status_code in (401, 403):
        raise refused_token_error(address, token)
    if answer.status_code == 404 and missing_ok:
        return None
    try:
        if answer.status_code == 200:
            return parse_json(answer.content)
    except ValueError:
        pass
    raise _not_ray(address, f"it answers {path} with status {answer.status_code} and no JSON of Ray's")


def reads_answers(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that reads answers of the dashboard at its first argument, which may be a connection.

    If the function fails because an answer is not Ray's, the error is a ClusterError.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except WRONG_ANSWER as e:
            raise unreachable(str(getattr(args[0], "address", args[0])), e) from e

    return wrapper


@contextmanager
def streamed(address: str, path: str, token: Token | None) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Request a path, and yield its status and the chunks as they arrive, without a timeout; errors are as in `get`."""
    import requests

    keep_off_proxies(address)
    try:
        with requests.get(
            address + path, headers=token.headers if token else {}, stream=True, timeout=(10, None)
        ) as answer:
            if answer.status_code in (401, 403):
                raise refused_token_error(address, token)
            yield answer.status_code, answer.iter_content(None)
    except requests.RequestException as e:
        raise unreachable(address, e) from e


def complete_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a log that arrives in chunks; the last line may lack its line break."""
    partial_line = ""
    for chunk in chunks:
        *lines, partial_line = (partial_line + chunk).split("\n")
        yield from lines
    if partial_line:
        yield partial_line


@reads_answers
def ray_version(address: str, token: Token | None) -> dict[str, Any]:
    """Return the answer of /api/version: `ray_version`, and `session_name`, which is unique to each cluster."""
    from packaging.version import Version

    version: dict[str, Any] = get(address, "/api/version", token)
    return version | {"ray_version": str(Version(version["ray_version"]))}


@reads_answers
def nodes(address: str, token: Token | None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the dashboard's entry for each live node, and Ray's lines of resource usage by node id."""
    summary = get(address, "/nodes?view=summary", token)["data"]
    raylets = (node["raylet"] for node in summary["summary"])
    return [r for r in raylets if r.get("state") != "DEAD"], summary["nodeLogicalResources"]


def is_open(address: str) -> bool:
    """Return whether a dashboard at this address answers without a token."""
    try:
        return bool(ray_version(address, None))
    except ClusterError:
        return False


def date(address: str, token: Token | None) -> str | None:
    """Return the server's current time as an HTTP `Date` header; None if the server does not send one."""
    import requests

    try:
        answer = requests.head(f"{address}/api/version", headers=token.headers if token else {}, timeout=10)
    except requests.RequestException as e:
        raise unreachable(address, e) from e
    date_header: str | None = answer.headers.get("Date")
    return date_header


def url_at(host: str, port: int) -> str:
    """Return the URL of a server of this machine on this host and port; a wildcard host becomes 127.0.0.1."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        return f"http://127.0.0.1:{port}"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Return whether the host of a URL is a loopback address, so that only this machine reaches it."""
    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def is_loopback_ip(ip: str) -> bool:
    """Return whether an IP address is loopback, be it an IPv4 one written as IPv6 (::ffff:127.0.0.1)."""
    parsed = ipaddress.ip_address(ip)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def unreachable(address: str, error: Exception) -> ClusterError:
    """Return the error for a request that got no answer, from the exception of the HTTP client."""
    import requests

    fix = "check the address, and that the cluster runs"
    if isinstance(error, requests.Timeout | TimeoutError):
        return ClusterError(f"cluster {address}", "no answer in time", fix)
    if isinstance(error, requests.exceptions.SSLError):
        fix = "check the scheme, or set REQUESTS_CA_BUNDLE to the file with your certificates"
        return ClusterError(f"cluster {address}", "no TLS connection with a certificate we trust", fix)
    text = str(error)
    if "NameResolutionError" in text or "Name or service not known" in text:
        return ClusterError(f"cluster {address}", "the name of its host is not known here", fix)
    if isinstance(error, requests.exceptions.InvalidURL):
        return ClusterError(f"cluster {address}", "it is not a URL", "write it like http://host:8265")
    if isinstance(error, (*WRONG_ANSWER, requests.TooManyRedirects)):
        return _not_ray(address, f"one of its answers is not Ray's ({type(error).__name__}: {text})")
    if "BadStatusLine" in text or "Connection aborted" in text or "Received HTTP/0.9" in text:
        return _not_ray(address, "something there does not speak HTTP")
    return ClusterError(f"cluster {address}", "nothing answers there", fix)


def _not_ray(address: str, reason: str) -> ClusterError:
    return ClusterError(f"cluster {address}", f"not a Ray dashboard: {reason}", "give the dashboard's URL (port 8265)")


def keep_off_proxies(address: str) -> None:
    """Add the host of a loopback address to no_proxy in this process' environment.

    Otherwise the package requests, which Ray's clients use, would send requests to 127.0.0.1 to the environment's
    proxy.
    """
    if is_loopback(address):
        host = urlsplit(address).hostname or ""
        for name in ("no_proxy", "NO_PROXY"):
            hosts = [h for h in os.environ.get(name, "").split(",") if h]
            if host not in hosts:
                os.environ[name] = ",".join([*hosts, host])
