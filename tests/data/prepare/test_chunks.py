"""The places where chunks of a file end."""

import pyarrow as pa

from mhmoe_ray.data.prepare.chunks import Chunk, Limit, read_chunks
from mhmoe_ray.data.sources import find_files
from tests.data.sources.read import data_spec


def chunks(folder, lines, characters):
    """Return the number of texts and of bad lines of each chunk."""
    folder.mkdir(parents=True)
    (folder / "f.jsonl").write_text("".join(f"{line}\n" for line in lines))
    spec = data_spec(folder, format="jsonl").model_copy(update={"max_bad_lines": len(lines)})
    files = find_files(spec)
    table = pa.Table.from_pylist([{"number": i, **file._asdict()} for i, file in enumerate(files)])
    read = read_chunks(table, spec=spec, limit=Limit(spec, files), quarantine=folder / "out", characters=characters)
    made = [Chunk.of_table(one) for one in read]
    return [(len(chunk.texts), chunk.tally.bad_lines) for chunk in made]


def test_they_depend_on_what_is_in_the_file_and_not_on_where_it_lies(tmp_path):
    lines = ['{"text": "the moon rises"}', '{"body": "of another key"}'] * 400
    found = chunks(tmp_path / "a", lines, 4000)
    assert len(found) > 10
    assert [sum(count) for count in zip(*found, strict=True)] == [400, 400]
    assert chunks(tmp_path / "of-a-much-longer-name" / "b", lines, 4000) == found


def test_lines_that_cannot_be_read_fill_them_too(tmp_path):
    """The reports of bad lines would otherwise be kept in memory, however many there are."""
    found = chunks(tmp_path / "a", ['{"body": "of another key"}'] * 1000, 4000)
    assert max(bad for _, bad in found) <= 10
