"""Images that a server refuses, and a web server that records whether an image is fetched from it."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from tests.support.images import bomb, encode_image, jpeg_of_scans, tiff_of_tile

HOSTILE_IMAGES = {
    "bomb": (bomb(), "more than 20 million"),
    "scans": (jpeg_of_scans(21), "scans, more than 30"),
    "narrow": (bomb(40_000, 1), "its longest side has 40,000 pixels, more than 32,768"),
    "tile": (tiff_of_tile(60_000), "the image has tiles of 60,000 x 60,000 pixels, more than 20 million"),
    "truncated": (encode_image(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))[:200], "cannot be"),
    "svg": (b"<svg/>", "no image of a known format"),
    "pdf": (b"%PDF-1.4", "no image of a known format"),
}
"""The bytes of each image, and a part of the reason for which it is refused."""


class RecordingServer(NamedTuple):
    """A web server that answers every request, and the paths that were requested from it."""

    url: str
    requested_paths: list[str]


@contextmanager
def recording_server() -> Iterator[RecordingServer]:
    """Run a web server on loopback during the block."""
    requested_paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested_paths.append(self.path)
            self.send_response(200)
            self.end_headers()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield RecordingServer(f"http://127.0.0.1:{server.server_port}", requested_paths)
    finally:
        server.shutdown()
        server.server_close()
