"""TCP proxy to a server of this machine that disturbs chosen HTTP requests, or is closed for a while."""

import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

FaultKind = Literal["reset", "cut", "stall", "flip", "none", "500", "503"]
"""What happens within a body: the connection is reset, is closed, transfers nothing more, changes one bit, or nothing.
A status is the whole response, without a request to the server.
"""
STATUS_LINES = {"500": "HTTP/1.1 500 Internal Server Error", "503": "HTTP/1.1 503 Slow Down"}

INTACT_BYTES = 1000
"""Number of bytes of a body that pass undisturbed."""


class Fault(NamedTuple):
    """Fault of the next request with a long enough body whose first line begins with `method` and contains `text`."""

    kind: FaultKind
    method: Literal["GET", "PUT", "HEAD"]
    """A fault of GET disturbs the body of the response, and one of PUT that of the request; HEAD has none."""
    text: str


class FaultyProxy:
    """Proxy whose faults each disturb one request; the server must close each connection after one response."""

    def __init__(self, target_port: int) -> None:
        self._target_port, self._open = target_port, True
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def disturb(self, *faults: Fault) -> None:
        """Add faults; a request gets the first one that fits it."""
        with self._lock:
            self._faults += faults

    @property
    def pending_faults(self) -> list[Fault]:
        """The faults that have disturbed no request yet."""
        with self._lock:
            return list(self._faults)

    def close_for(self, seconds: float) -> None:
        """Close all connections, and for `seconds` also each new one at once; return when the proxy works again."""
        self._open = False
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._open = True

    def _accept(self) -> None:
        """Connect each new client to the server; close its connection if the proxy is closed or the server ended."""
        while True:
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self._target_port)) if self._open else None
            except OSError:
                server = None
            if server is None:
                client.close()
                continue
            self._connections += [client, server]
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        """Pass one request and its response on, with the fault that fits the request, and close the connection."""
        kind, transfers = None, dict[socket.socket, _Transfer]()
        with suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(1 << 16)):
                head += data
            fault = self._take_fault(head.partition(b"\r\n")[0].decode(errors="replace"))
            if fault and fault.kind in STATUS_LINES:
                head = f"{STATUS_LINES[fault.kind]}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                client.sendall(head)
            else:
                request_fault, response_fault = (fault if fault and fault.method == m else None for m in ("PUT", "GET"))
                transfers = {client: _Transfer(server, request_fault), server: _Transfer(client, response_fault)}
                kind = transfers[client].send(head) or _pass_on(transfers)
            # In a stall, the client gives up first, and closes its connection.
            while kind == "stall" and client.recv(1 << 16):
                pass
        self.disturb(*(transfer.fault for transfer in transfers.values() if transfer.fault))
        if kind == "reset":
            # To close a socket that does not linger sends a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        server.close()

    def _take_fault(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if request.startswith(fault.method) and fault.text in request:
                    self._faults.remove(fault)
                    return fault
        return None


@dataclass
class _Transfer:
    """One direction of a connection."""

    target: socket.socket
    fault: Fault | None
    head: bytes = b""
    body_bytes: int = 0

    def send(self, data: bytes) -> FaultKind | None:
        """Send data to the target; return the kind of a fault that ends the connection with them."""
        if b"\r\n\r\n" in self.head:
            self.body_bytes += len(data)
        else:
            self.head += data
            self.body_bytes = len(self.head.partition(b"\r\n\r\n")[2])
        position, fault = len(data) - (self.body_bytes - INTACT_BYTES), self.fault
        if fault and position < len(data):
            self.fault = None
            if fault.kind in ("reset", "cut", "stall"):
                self.target.sendall(data[:position])
                return fault.kind
            flipped_byte = bytes([data[position] ^ (fault.kind == "flip")])
            data = data[:position] + flipped_byte + data[position + 1 :]
        self.target.sendall(data)
        return None


def _pass_on(transfers: Mapping[socket.socket, _Transfer]) -> FaultKind | None:
    """Pass data on until one side closes its connection, or until a fault, whose kind is returned."""
    # One thread serves both directions: a socket that another thread waits for would not be reset.
    while True:
        for source in select.select([*transfers], [], [])[0]:
            data = source.recv(1 << 16)
            kind = transfers[source].send(data)
            if kind or not data:
                return kind
