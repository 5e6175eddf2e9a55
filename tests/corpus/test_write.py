import json

import pyarrow as pa

from mhmoe_ray.corpus import small
from mhmoe_ray.corpus.small import Shards, remove_sample


def test_shards_fill_up_and_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "SHARD_BYTES", 100)
    shards = Shards(tmp_path)
    records = [{"text": "é" * n, "meta": {}} for n in (10, 30, 200, 5)]
    for record in records:
        shards.add(record)
    assert [p.suffix for p in sorted(tmp_path.iterdir())].count(".part") == 1
    shards.close()
    assert (shards.documents, shards.bytes) == (4, 2 * 245)
    paths = sorted(tmp_path.iterdir())
    assert [p.name for p in paths] == [f"sample-{i:05d}.jsonl.zst" for i in range(len(paths))]
    read = [json.loads(line) for p in paths for line in pa.input_stream(str(p)).read().splitlines()]
    assert read == records
    assert all(len(pa.input_stream(str(p)).read().splitlines()) == 1 for p in paths[1:3])


def test_what_is_abandoned_leaves_nothing(tmp_path):
    shards = Shards(tmp_path / "hr")
    shards.add({"text": "a", "meta": {}})
    shards.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_sample_is_removed_and_other_files_stay(tmp_path):
    for name in ("redpajama/c4/sample-00001.jsonl.zst", "multilingual/de/sample.jsonl.zst", "redpajama/own/mine.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    remove_sample(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["redpajama/own/mine.jsonl"]
    assert not (tmp_path / "multilingual/de").exists()
