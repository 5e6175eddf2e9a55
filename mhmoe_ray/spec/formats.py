"""Formats of raw text by name. Files of one are read by the module of its name in data/sources/formats/."""

from typing import Literal

Format = Literal["jsonl", "redpajama-v2", "parquet", "text", "huggingface"]

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
"""Of those whose files are known by their names' ends; the others are known by their folders (`find.py`)."""
