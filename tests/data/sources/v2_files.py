"""Writer of files in the published format of RedPajama-V2."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mhmoe_ray.spec.filters import SIGNALS

GOOD_SIGNALS = {
    **{"rps_doc_word_count": 120.0, "rps_doc_mean_word_length": 4.7, "rps_doc_stop_word_fraction": 0.3},
    **{"ccnet_perplexity": 300.0, "rps_doc_symbol_to_word_ratio": 0.0},
}
"""Signals of a document that meets all of Gopher's rules; other signals are 0."""


def write_v2_files(root: Path, stem: str, rows: list[dict[str, Any]]) -> None:
    """Write the documents, quality signals, duplicates and MinHash signatures of a stem such as `2023-06/0000/en_head`.

    As published, a stem of the bucket `tail` has documents only.

    Args:
        root: the folder of the dataset.
        stem: snapshot, shard, language and bucket.
        rows: for each document its `text`, and optionally `signals`, which replace those of `GOOD_SIGNALS` (a list has
            a score for each line), `duplicate`, whether the document is listed as one, and `bands` of its signature.
    """
    snapshot, _, name = stem.split("/")
    language, bucket = name.split("_")
    identifiers = [f"{stem}.json.gz/{row}" for row in range(len(rows))]
    documents, signals = [], []
    for identifier, row in zip(identifiers, rows, strict=True):
        text = row["text"]
        digest = "sha1:" + hashlib.sha1(text.encode()).hexdigest()[:32].upper()
        documents.append(
            {
                **{"url": f"http://{identifier}", "date_download": "2023-02-08T00:00:00Z", "digest": digest},
                **{"length": len(text), "nlines": text.count("\n") + 1, "source_domain": "example.org", "title": "T"},
                **{"raw_content": text, "cc_segment": "crawl-data/x.wet.gz", "original_nlines": 9},
                **{"original_length": 999, "line_ids": [0], "language": language, "language_score": 0.98},
                **{"perplexity": 300.0, "bucket": bucket},
            }
        )
        scores = dict.fromkeys(sorted(SIGNALS), 0.0) | GOOD_SIGNALS | row.get("signals", {})
        spans = {
            name: [[i, i + 1, s] for i, s in enumerate(score)] if isinstance(score, list) else [[0, len(text), score]]
            for name, score in scores.items()
        }
        number = int.from_bytes(hashlib.sha1(identifier.encode()).digest()[:8], "big")
        meta = {"cc_segment": "crawl-data/x.wet.gz", "language": language, "snapshot_id": snapshot}
        signals.append({"id": identifier, "id_int": number, "metadata": meta, "quality_signals": spans})
    _write_lines(root / "documents" / f"{stem}.json.gz", documents)
    if bucket == "tail":
        return
    _write_lines(root / "quality_signals" / f"{stem}.signals.json.gz", signals)
    duplicate_ids = [i for i, row in zip(identifiers, rows, strict=True) if row.get("duplicate")]
    _write_table(
        root / "duplicates" / f"{stem}.duplicates.parquet",
        {
            "shard_id": [f"{stem}.json.gz"] * len(duplicate_ids),
            "doc_id": duplicate_ids,
            "digest": ["sha1:"] * len(duplicate_ids),
        },
    )
    bands = pa.array([row.get("bands") for row in rows], pa.list_(pa.binary()))
    columns = {"shard_id": [f"{stem}.json.gz"] * len(rows), "id": identifiers, "id_int": list(range(len(rows)))}
    columns |= {f"signature_sim{s}": bands for s in ("0.7", "0.8", "0.9", "1.0")}
    _write_table(root / "minhash" / f"{stem}.minhash.parquet", columns)


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in records)))


def _write_table(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
