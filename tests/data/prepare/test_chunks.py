"""Tests of the places where chunks of a file end."""

import pyarrow as pa

from mhmoe_ray.data.prepare.chunks import DocumentChunk, QuarantineLimit, read_chunks
from mhmoe_ray.data.sources import find_files
from tests.data.sources.read import data_spec


def chunk_counts(folder, lines, characters):
    """Write lines to a file; return the numbers of texts and bad lines in each chunk of `characters` characters."""
    folder.mkdir(parents=True)
    (folder / "f.jsonl").write_text("".join(f"{line}\n" for line in lines))
    spec = data_spec(folder, format="jsonl").model_copy(update={"max_bad_lines": len(lines)})
    files = find_files(spec)
    table = pa.Table.from_pylist([{"number": i, **file._asdict()} for i, file in enumerate(files)])
    tables = read_chunks(
        table, spec=spec, limit=QuarantineLimit(spec, files), quarantine=folder / "out", characters=characters
    )
    chunks = [DocumentChunk.from_table(chunk_table) for chunk_table in tables]
    return [(len(chunk.documents), chunk.tally.bad_lines) for chunk in chunks]


def test_chunks_depend_on_the_content_of_a_file_only(tmp_path):
    lines = ['{"text": "the moon rises"}', '{"body": "of another key"}'] * 400
    counts = chunk_counts(tmp_path / "a", lines, 4000)
    assert len(counts) > 10
    assert [sum(count) for count in zip(*counts, strict=True)] == [400, 400]
    assert chunk_counts(tmp_path / "of-a-much-longer-name" / "b", lines, 4000) == counts


def test_bad_lines_fill_chunks(tmp_path):
    """A bad line adds to the size of a chunk like text, so no chunk has many of them in memory."""
    counts = chunk_counts(tmp_path / "a", ['{"body": "of another key"}'] * 1000, 4000)
    assert max(bad_count for _, bad_count in counts) <= 10
