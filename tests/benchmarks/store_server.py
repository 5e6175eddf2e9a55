"""S3 server of a local folder behind a link with latency and a limited rate; it answers HEAD, ranges of GET and lists.

It runs in a process of its own. `GET /counts` returns the counts of the requests that read objects, without a delay,
and starts new ones.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from mhmoe_ray.cluster.spawn import free_ports


class Link(NamedTuple):
    """Link to the server."""

    latency: float
    """Seconds until a response begins to arrive."""
    rate: float
    """Bytes per second of all responses together."""


class StoreClient(NamedTuple):
    """Access to a running server."""

    port: int

    @property
    def query(self) -> str:
        """Query of the URIs of objects, whose bucket is the server's folder."""
        return f"region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{self.port}"

    def take_counts(self) -> dict[str, Any]:
        """Return `requests`, `bytes` and the most requests of a second (`peak`) since the last call."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/counts") as response:
            counts: dict[str, Any] = json.load(response)
        return counts


@contextmanager
def store_server(folder: Path, link: Link) -> Iterator[StoreClient]:
    """Serve a folder during the block."""
    [port] = free_ports(1)
    server = subprocess.Popen([sys.executable, "-m", __name__, str(folder), str(port), *map(str, link)])
    try:
        while server.poll() is None:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield StoreClient(port)
    finally:
        server.terminate()
        server.wait(30)


class Server:
    """State that all connections share: the folder, the link and the counts."""

    def __init__(self, folder: Path, link: Link) -> None:
        self.folder, self.link = folder, link
        self._free_time = 0.0  # time at which the link has sent all responses so far
        self._counts = {"requests": 0, "bytes": 0}
        self._seconds: dict[int, int] = {}

    def delay(self, size: int) -> float:
        """Return the seconds until a response of some bytes, which begins now, has arrived."""
        start_time = time.monotonic()
        self._free_time = max(start_time, self._free_time) + size / self.link.rate
        return self._free_time - start_time + self.link.latency

    def take_counts(self) -> bytes:
        content = json.dumps(self._counts | {"peak": max(self._seconds.values(), default=0)}).encode()
        self._counts, self._seconds = {"requests": 0, "bytes": 0}, {}
        return content

    def answer(self, method: str, target: str, byte_range: str | None) -> tuple[str, list[str], bytes]:
        """Return the status, the headers and the body of the response to a request."""
        url = urllib.parse.urlsplit(target)
        path = self.folder / urllib.parse.unquote(url.path).strip("/").partition("/")[2]
        if "list-type=2" in url.query:
            return "200 OK", [], self._listing(urllib.parse.parse_qs(url.query).get("prefix", [""])[0])
        if path == self.folder:
            return "200 OK", ["Content-Length: 0"], b""
        if not path.is_file():
            return "404 Not Found", [], b"<Error><Code>NoSuchKey</Code></Error>"
        status = path.stat()
        headers = [f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}", f'ETag: "{status.st_mtime_ns}"']
        if method == "HEAD":
            return "200 OK", [*headers, f"Content-Length: {status.st_size}"], b""
        start, _, end = (byte_range or "bytes=0-").removeprefix("bytes=").partition("-")
        with path.open("rb") as file:
            file.seek(int(start))
            content = file.read(int(end) + 1 - int(start) if end else -1)
        second = int(time.monotonic())
        self._seconds[second] = self._seconds.get(second, 0) + 1
        self._counts["requests"] += 1
        self._counts["bytes"] += len(content)
        headers.append(f"Content-Range: bytes {start}-{int(start) + len(content) - 1}/{status.st_size}")
        return "206 Partial Content" if byte_range else "200 OK", headers, content

    def _listing(self, prefix: str) -> bytes:
        files = {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}
        entries = [
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size></Contents>"
            for key, path in sorted(files.items())
            if key.startswith(prefix)
        ]
        return f"<ListBucketResult><KeyCount>{len(entries)}</KeyCount>{''.join(entries)}</ListBucketResult>".encode()


class Connection(asyncio.Protocol):
    """Connection of a client, which sends one request after another."""

    def __init__(self, server: Server) -> None:
        self._server, self._head = server, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._head += data
        if not self._head.endswith(b"\r\n\r\n"):
            return
        request, *lines = self._head.decode("latin-1").split("\r\n")
        self._head = b""
        method, target, _ = request.split(" ")
        if target == "/counts":
            self._send("200 OK", [], self._server.take_counts())
            return
        ranges = [line.partition(": ")[2] for line in lines if line.lower().startswith("range: ")]
        response = self._server.answer(method, target, ranges[0] if ranges else None)
        asyncio.get_running_loop().call_later(self._server.delay(len(response[2])), self._send, *response)

    def _send(self, status: str, headers: list[str], body: bytes) -> None:
        if not any(header.startswith("Content-Length") for header in headers):
            headers = [*headers, f"Content-Length: {len(body)}"]
        self._transport.write("\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body)


async def serve(folder: Path, port: int, link: Link) -> None:
    """Serve a folder until the process ends."""
    server = Server(folder, link)
    listener = await asyncio.get_running_loop().create_server(lambda: Connection(server), "127.0.0.1", port)
    await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), Link(float(sys.argv[3]), float(sys.argv[4]))))
