"""Writing files so that a reader sees the old one or the new one, whole, also after a crash."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from mhmoe_ray.location import Location, ObjectPath


def replace_file(path: Location, data: bytes | memoryview) -> None:
    """Write a file in one step, its folder too where that is missing. Several may write at the same time."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Location, value: dict[str, Any]) -> None:
    replace_file(path, json.dumps(value, indent=1).encode())


@contextmanager
def create_file(path: Location) -> Iterator[BinaryIO]:
    """A new file to write, its folder made too; on the disk when the context ends.

    Raises:
        FileExistsError: it is there already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb", buffering=0) as f:
        yield f
        if not isinstance(path, ObjectPath):
            os.fsync(f.fileno())


def copy_file(source: Location, to: Location) -> None:
    """A small one, in one step."""
    replace_file(to, source.read_bytes())


def remove_tree(folder: Location) -> None:
    """A folder and all in it."""
    if isinstance(folder, ObjectPath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder)
