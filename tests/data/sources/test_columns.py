import json
import secrets

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mhmoe_ray.data.sources import Reason, columns
from mhmoe_ray.data.sources.columns import as_bytes
from mhmoe_ray.errors import DataError
from tests.data.sources.read import bad, items_of, read, texts
from tests.data.texts import documents

TEXTS = [*documents("row", 300), "größer 漢字", "NUL \0 is Unicode"]


def table(values, kind=None) -> pa.Table:
    return pa.table({"id": list(range(len(values))), "text": pa.array(values, kind or pa.string())})


def write_dataset(folder, rows, files=2, **state):
    """Write the files that `save_to_disk` of the package `datasets` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        part = table(rows[i * len(rows) // files : (i + 1) * len(rows) // files])
        with pa.ipc.new_stream(folder / name, part.schema) as out:
            for batch in part.to_batches(max_chunksize=50):
                out.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], **state}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet_gives_its_column_in_order(tmp_path, kind, compression):
    pq.write_table(table(TEXTS, kind), tmp_path / "f.parquet", compression=compression, row_group_size=70)
    items, tally = read(tmp_path)
    assert texts(items) == TEXTS
    assert [i.line for i in items] == list(range(1, len(TEXTS) + 1))
    assert tally.bytes_read == (tmp_path / "f.parquet").stat().st_size


def test_a_row_group_is_never_held_whole(tmp_path):
    rows = [secrets.token_hex(5_000) for _ in range(8_000)]
    pq.write_table(table(rows), tmp_path / "f.parquet", use_dictionary=False, compression="zstd")
    assert (tmp_path / "f.parquet").stat().st_size > 38e6
    before, held = pa.total_allocated_bytes(), []
    for row, item in zip(rows, items_of(tmp_path), strict=True):
        assert item.text == row
        held.append(pa.total_allocated_bytes() - before)
    assert max(held) < 20e6


def test_a_dictionary_is_checked_once_a_row_group(tmp_path, monkeypatch):
    checked = []

    def counted(texts):
        if isinstance(texts, pa.DictionaryArray):
            checked.append(len(texts.dictionary))
        return as_bytes(texts)

    monkeypatch.setattr(columns, "as_bytes", counted)
    kind = pa.dictionary(pa.int32(), pa.string())
    pq.write_table(table(TEXTS * 20, kind), tmp_path / "f.parquet", row_group_size=3000)
    assert texts(read(tmp_path)[0]) == TEXTS * 20
    assert checked == [len(TEXTS)] * 3


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_row_without_a_usable_text_is_told(tmp_path, kind):
    raw = pa.array([b"good", None, b"bad \xff", b"  ", b"x" * 2000, b"good"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    if pa.types.is_dictionary(kind):
        text = pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 2, 3, 0], pa.int32()), text.drop_null().slice(0, 4))
    pq.write_table(pa.table({"text": text}), tmp_path / "f.parquet")
    items, _ = read(tmp_path, max_document_mb=1e-3)
    assert texts(items) == ["good", "good"]
    assert bad(items) == [(2, Reason.NO_TEXT), (3, Reason.NOT_UTF8), (4, Reason.EMPTY), (5, Reason.TOO_LONG)]


def test_a_missing_or_wrong_column_is_told_with_what_there_is(tmp_path):
    pq.write_table(table(TEXTS), tmp_path / "f.parquet")
    [lost], _ = read(tmp_path, text_field="body")
    assert lost.why == "a part of the file is lost (it has no column 'body'; it has 'id', 'text')"
    [lost], _ = read(tmp_path, text_field="id")
    assert "'id' holds int64, not strings" in lost.why


def test_of_a_damaged_row_group_only_that_is_lost(tmp_path):
    path = tmp_path / "f.parquet"
    pq.write_table(table(TEXTS), path, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    items, tally = read(tmp_path)
    assert texts(items) == TEXTS[:100] + TEXTS[200:]
    assert bad(items) == [(101, Reason.LOST)]
    assert items[100].detail.startswith("rows 101 to 200: ")
    assert tally.damaged == 1


@pytest.mark.parametrize("size", [0, 3, 500])
def test_parquet_without_its_end_is_lost(tmp_path, size):
    path = tmp_path / "f.parquet"
    pq.write_table(table(TEXTS), path)
    path.write_bytes(path.read_bytes()[:size])
    assert bad(read(tmp_path)[0]) == [(1, Reason.LOST)]


def test_a_dataset_saved_by_hugging_face(tmp_path):
    write_dataset(tmp_path / "de", TEXTS)
    write_dataset(tmp_path / "en", TEXTS[:10], files=1)
    items, tally = read(tmp_path)
    assert texts(items) == TEXTS + TEXTS[:10]
    assert tally.files == 3
    assert texts(read(tmp_path / "en", format="huggingface")[0]) == TEXTS[:10]


def test_of_a_dictionary_of_splits_train_is_read(tmp_path):
    for split, rows in {"train": TEXTS[:20], "test": TEXTS[20:]}.items():
        write_dataset(tmp_path / "set" / split, rows)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(read(tmp_path)[0]) == TEXTS[:20]
    assert texts(read(tmp_path / "set")[0]) == TEXTS[:20]
    assert texts(read(tmp_path / "set" / "test")[0]) == TEXTS[20:]
    (tmp_path / "set" / "train" / "state.json").unlink()
    with pytest.raises(DataError, match="has no split named train"):
        read(tmp_path)


def test_a_dataset_that_is_no_list_of_its_rows_is_refused(tmp_path):
    write_dataset(tmp_path, TEXTS, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        read(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json cannot be read"):
        read(tmp_path)


def test_a_stream_cut_between_two_batches_does_not_pass_for_whole(tmp_path):
    write_dataset(tmp_path, TEXTS[:100], files=1)
    path = tmp_path / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    with pa.OSFile(str(path)) as f, pa.ipc.open_stream(f) as stream:
        stream.read_next_batch()
        middle = f.tell()
    for end, there in [(middle, 50), (middle + 9, 50), (len(whole) - 8, 100), (5, 0)]:
        path.write_bytes(whole[:end])
        items, _ = read(tmp_path)
        assert texts(items) == TEXTS[:there]
        assert bad(items) == [(there + 1, Reason.LOST)]


@pytest.mark.parametrize("index", [3, 1 << 30, -1])
def test_an_index_that_points_outside_of_its_dictionary_loses_a_batch_and_not_the_process(tmp_path, index):
    indices = [pa.array(numbers, pa.int32()) for numbers in ([2, 0, 1], [0, index, 1])]
    columns = [pa.DictionaryArray.from_arrays(i, pa.array(TEXTS[:3]), safe=False) for i in indices]
    write_dataset(tmp_path, TEXTS[:3], files=1)
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", pa.schema([("text", columns[0].type)])) as out:
        for column in columns:
            out.write_batch(pa.record_batch([column], ["text"]))
    items, _ = read(tmp_path)
    assert texts(items) == [TEXTS[2], TEXTS[0], TEXTS[1]]
    assert bad(items) == [(4, Reason.LOST)]


@pytest.mark.parametrize("offsets", [[0, 1 << 30, 6, 9], [0, 3, -5, 9], [0, 3, 2, 9]])
def test_offsets_that_point_outside_of_the_data_lose_a_batch_and_not_the_process(tmp_path, offsets):
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(b"onetwosix")]
    column = pa.Array.from_buffers(pa.string(), 3, buffers)
    write_dataset(tmp_path, TEXTS[:4], files=1)
    batches = [pa.record_batch([pa.array(TEXTS[:4])], ["text"]), pa.record_batch([column], ["text"])]
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", batches[0].schema) as out:
        for batch in batches:
            out.write_batch(batch)
    items, _ = read(tmp_path)
    assert texts(items) == TEXTS[:4]
    assert bad(items) == [(5, Reason.LOST)]


def test_a_data_file_that_is_missing_is_told(tmp_path):
    write_dataset(tmp_path, TEXTS)
    (tmp_path / "data-00000-of-00002.arrow").unlink()
    items, _ = read(tmp_path)
    assert texts(items) == TEXTS[len(TEXTS) // 2 :]
    assert bad(items) == [(1, Reason.LOST)]
