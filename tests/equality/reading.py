"""Files as values that can be compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FLOATS = {"F32": np.float32, "F64": np.float64, "F16": np.float16}


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(path: Path) -> dict[str, Any]:
    """Return the dtype, the shape and the SHA-256 of the bytes of each tensor of a safetensors file, by its name.

    Each entry also has the place where the tensor begins in its whole, if the file records it. A float tensor has its
    norm too, which shows how far apart two are.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    offsets = json.loads(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
    described = {}
    for name, entry in sorted(header.items()):
        tensor_start, tensor_end = entry["data_offsets"]
        raw = data[start + tensor_start : start + tensor_end]
        described[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "begins": offsets.get(name)}
        if entry["dtype"] in FLOATS:
            values = np.frombuffer(raw, FLOATS[entry["dtype"]]).astype(np.float64)
            described[name]["norm"] = float(np.sqrt(np.square(values).sum()))
        described[name]["sha256"] = hashlib.sha256(raw).hexdigest()
    return described


def contents(folder: Path) -> dict[str, Any]:
    """Return all files below a folder: tensors as `tensors`, JSON as it is, texts whole, any other by its SHA-256."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return tensors(path)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return json.loads(path.read_text())
    try:
        return path.read_text() if path.name != "tokenizer.json" else digest(path)
    except UnicodeDecodeError:
        return digest(path)
