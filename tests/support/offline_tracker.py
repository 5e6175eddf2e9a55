"""Reader of the files that wandb's package writes offline: logs of LevelDB with messages of its protocol."""

import struct
from collections.abc import Iterator
from typing import Any

from mhmoe_ray.runs.directory import RunDir

BLOCK_BYTES, HEADER_BYTES = 32768, 7


def offline_records(run: RunDir) -> Iterator[Any]:
    """Yield the records of a run's only offline file."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = run.path.glob("wandb/offline-run-*/*.wandb")
    data, position, pieces = file.read_bytes(), HEADER_BYTES, b""
    while position < len(data):
        if (space := BLOCK_BYTES - position % BLOCK_BYTES) < HEADER_BYTES:
            position += space
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER_BYTES
        pieces += data[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(pieces)
            pieces = b""


def offline_history(run: RunDir, tag: str) -> list[tuple[int, float]]:
    """Return step and value of a metric, in the order of the file."""
    rows = [record.history.item for record in offline_records(run) if record.WhichOneof("record_type") == "history"]
    values = [{item.key or item.nested_key[0]: item.value_json for item in row} for row in rows]
    return [(int(row["_step"]), float(row[tag])) for row in values]
