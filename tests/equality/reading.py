"""Functions that read files as values that can be compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FLOATS = {"F32": np.float32, "F64": np.float64, "F16": np.float16}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that has one on each line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(path: Path) -> dict[str, Any]:
    """Describe each tensor of a safetensors file, by its name: dtype, shape and the SHA-256 of its bytes.

    If a tensor is a slice of a sharded one, `begins` has the offset that the file records for the slice; else it is
    None. Tensors with a dtype of `FLOATS` also have their norm, whose difference hints at how far apart two are.
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
    """Return the content of each file below a folder, by its relative path.

    The content of a safetensors file is the result of `tensors`, that of JSON is its value, that of another text is the
    text; tokenizers and all other files are given by their SHA-256.
    """
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    """Return the content of one file, as described for `contents`."""
    if path.suffix == ".safetensors":
        return tensors(path)
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return json.loads(path.read_text())
    try:
        return path.read_text() if path.name != "tokenizer.json" else digest(path)
    except UnicodeDecodeError:
        return digest(path)
