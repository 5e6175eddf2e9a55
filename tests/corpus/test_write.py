import json

import pyarrow as pa

from mhmoe_ray.corpus.shards import TextShardWriter
from mhmoe_ray.corpus.small import remove_sample


def test_shard_writer_fills_shards_with_all_records(tmp_path, monkeypatch):
    monkeypatch.setattr(TextShardWriter, "max_bytes", 100)
    writer = TextShardWriter(tmp_path)
    records = [{"text": "é" * n, "meta": {}} for n in (10, 30, 200, 5)]
    for record in records:
        writer.add(record)
    assert [p.suffix for p in sorted(tmp_path.iterdir())].count(".part") == 1
    writer.close()
    assert (writer.count, writer.text_bytes) == (4, 2 * 245)
    paths = sorted(tmp_path.iterdir())
    assert [p.name for p in paths] == [f"sample-{i:05d}.jsonl.zst" for i in range(len(paths))]
    written_records = [json.loads(line) for p in paths for line in pa.input_stream(str(p)).read().splitlines()]
    assert written_records == records
    assert all(len(pa.input_stream(str(p)).read().splitlines()) == 1 for p in paths[1:3])


def test_discard_leaves_no_file(tmp_path):
    writer = TextShardWriter(tmp_path / "hr")
    writer.add({"text": "a", "meta": {}})
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_remove_sample_keeps_other_files(tmp_path):
    sample_files = ["redpajama/c4/sample-00001.jsonl.zst", "multilingual/de/sample.jsonl.zst"]
    sample_files += [f"chat/{part}/english/sample-00000.jsonl.zst" for part in ("train", "held-out")]
    for name in (*sample_files, "redpajama/own/mine.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    remove_sample(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["redpajama/own/mine.jsonl"]
    assert not (tmp_path / "multilingual/de").exists()
    assert not (tmp_path / "chat/held-out/english").exists()
