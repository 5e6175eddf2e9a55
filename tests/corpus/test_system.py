"""The large sample as a user builds it, for which some 180 MB of packages are downloaded."""

import json

import pyarrow as pa
import pytest

from tests.cli.run import mhmoe
from tests.corpus.made_packages import records_of


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(3600)
def test_the_large_sample(tmp_path):
    written = mhmoe(tmp_path, "data", "sample", "out", "--large", "--json").json()
    out = tmp_path / "out"
    assert written["missing"] == []
    assert sum(written["bytes"].values()) >= 100_000_000
    assert sum(size >= 1_000_000 for name, size in written["bytes"].items() if "multilingual" in name) >= 20
    assert {p.name for p in (out / "redpajama").iterdir()} >= {"book", "c4", "common_crawl", "github", "wikipedia"}
    licensed = {p.stem for p in (out / "licenses").iterdir() if p.stat().st_size > 200}
    documents = 0
    for path in sorted(out.rglob("*.jsonl.zst")):
        for line in pa.input_stream(str(path)).read().splitlines():
            meta = json.loads(line)["meta"]
            documents += 1
            assert all((meta["source"], meta["license"], meta["url"]))
            if meta["source"].endswith("(Debian)"):
                assert meta["source"].split()[0] in licensed
    assert documents == sum(written["documents"].values())
    read = records_of(out / "redpajama") + records_of(out / "multilingual")
    assert len(read) == documents
