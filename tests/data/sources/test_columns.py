import secrets
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mhmoe_ray.data.sources import Reason, columns
from mhmoe_ray.data.sources.columns import as_bytes
from mhmoe_ray.errors import DataError
from tests.data.sources.read import bad_lines, document_texts, iterate_source, read_source
from tests.data.sources.tables import make_table, write_dataset
from tests.data.texts import make_documents

TEXTS = [*make_documents("row", 300), "größer 漢字", "NUL \0 is Unicode"]


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet_yields_its_column_in_order(tmp_path, text_type, compression):
    pq.write_table(make_table(TEXTS, text_type), tmp_path / "f.parquet", compression=compression, row_group_size=70)
    items, tally = read_source(tmp_path)
    assert document_texts(items) == TEXTS
    assert [i.line for i in items] == list(range(1, len(TEXTS) + 1))
    assert tally.bytes_read == (tmp_path / "f.parquet").stat().st_size


def test_parquet_reader_holds_less_than_a_row_group(tmp_path):
    rows = [secrets.token_hex(5_000) for _ in range(8_000)]
    pq.write_table(make_table(rows), tmp_path / "f.parquet", use_dictionary=False, compression="zstd")
    assert (tmp_path / "f.parquet").stat().st_size > 38e6
    start_bytes, memory_growth = pa.total_allocated_bytes(), []
    for row, item in zip(rows, iterate_source(tmp_path), strict=True):
        assert item.text == row
        memory_growth.append(pa.total_allocated_bytes() - start_bytes)
    assert max(memory_growth) < 20e6


def read_with_memory(folder) -> tuple[int, int]:
    """Return the number of rows that a new process reads, and the growth of its memory in bytes."""
    program = (
        "import resource, sys\n"
        "from tests.data.sources.read import iterate_source\n"
        "memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "start = memory()\n"
        "print(sum(1 for _ in iterate_source(sys.argv[1])), memory() - start)"
    )
    output = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True).stdout
    rows, memory_growth = map(int, output.split())
    return rows, memory_growth


@pytest.mark.parametrize("has_dictionary_type", [False, True])
def test_reader_holds_few_copies_of_a_text_that_a_dictionary_repeats(tmp_path, has_dictionary_type):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 34, pa.int32()), pa.array(["x" * 25_000_000]))
    pq.write_table(pa.table({"text": text}), tmp_path / "f.parquet", store_schema=has_dictionary_type)
    rows, memory_growth = read_with_memory(tmp_path)
    assert rows == 34
    assert memory_growth < 450e6


def test_parquet_reader_refuses_columns_that_unpack_to_far_more_than_their_size(tmp_path):
    table = make_table(["x" * 20_000_000] * 5)
    pq.write_table(table, tmp_path / "f.parquet", compression="zstd", use_dictionary=False)
    [bad_line], _ = read_source(tmp_path)
    assert "rows 1 to 5: a column unpacks to 100,000," in bad_line.message


def test_parquet_reader_checks_a_dictionary_once_per_row_group(tmp_path, monkeypatch):
    dictionary_lengths = []

    def count_dictionaries(texts):
        if isinstance(texts, pa.DictionaryArray):
            dictionary_lengths.append(len(texts.dictionary))
        return as_bytes(texts)

    monkeypatch.setattr(columns, "as_bytes", count_dictionaries)
    text_type = pa.dictionary(pa.int32(), pa.string())
    pq.write_table(make_table(TEXTS * 20, text_type), tmp_path / "f.parquet", row_group_size=3000)
    assert document_texts(read_source(tmp_path)[0]) == TEXTS * 20
    assert dictionary_lengths == [len(TEXTS)] * 3


@pytest.mark.parametrize("text_type", [pa.string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_reader_reports_rows_without_text(tmp_path, text_type):
    raw = pa.array([b"good", None, b"bad \xff", b"  ", b"x" * 2000, b"good"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    if pa.types.is_dictionary(text_type):
        text = pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 2, 3, 0], pa.int32()), text.drop_null().slice(0, 4))
    pq.write_table(pa.table({"text": text}), tmp_path / "f.parquet")
    items, _ = read_source(tmp_path, max_document_mb=1e-3)
    assert document_texts(items) == ["good", "good"]
    assert bad_lines(items) == [(2, Reason.NO_TEXT), (3, Reason.NOT_UTF8), (4, Reason.EMPTY), (5, Reason.TOO_LONG)]


def test_parquet_reader_reports_a_missing_or_wrong_column(tmp_path):
    pq.write_table(make_table(TEXTS), tmp_path / "f.parquet")
    [bad_line], _ = read_source(tmp_path, text_field="body")
    assert bad_line.message == "a part of the file is lost (it has no column 'body'; it has 'id', 'text')"
    [bad_line], _ = read_source(tmp_path, text_field="id")
    assert "'id' holds int64, not strings" in bad_line.message


def test_parquet_reader_skips_only_a_damaged_row_group(tmp_path):
    path = tmp_path / "f.parquet"
    pq.write_table(make_table(TEXTS), path, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    items, tally = read_source(tmp_path)
    assert document_texts(items) == TEXTS[:100] + TEXTS[200:]
    assert bad_lines(items) == [(101, Reason.PART_LOST)]
    assert items[100].detail.startswith("rows 101 to 200: ")
    assert tally.damaged == 1


@pytest.mark.parametrize("size", [0, 3, 500])
def test_parquet_reader_reports_a_truncated_file(tmp_path, size):
    path = tmp_path / "f.parquet"
    pq.write_table(make_table(TEXTS), path)
    path.write_bytes(path.read_bytes()[:size])
    assert bad_lines(read_source(tmp_path)[0]) == [(1, Reason.PART_LOST)]


def test_hugging_face_dataset_is_read(tmp_path):
    write_dataset(tmp_path / "de", TEXTS)
    write_dataset(tmp_path / "en", TEXTS[:10], files=1)
    items, tally = read_source(tmp_path)
    assert document_texts(items) == TEXTS + TEXTS[:10]
    assert tally.files == 3
    assert document_texts(read_source(tmp_path / "en", format="huggingface")[0]) == TEXTS[:10]


def test_hugging_face_dataset_yields_its_train_split(tmp_path):
    for split, rows in {"train": TEXTS[:20], "test": TEXTS[20:]}.items():
        write_dataset(tmp_path / "set" / split, rows)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert document_texts(read_source(tmp_path)[0]) == TEXTS[:20]
    assert document_texts(read_source(tmp_path / "set")[0]) == TEXTS[:20]
    assert document_texts(read_source(tmp_path / "set" / "test")[0]) == TEXTS[20:]
    (tmp_path / "set" / "train" / "state.json").unlink()
    with pytest.raises(DataError, match="has no split named train"):
        read_source(tmp_path)


def test_hugging_face_dataset_with_indices_is_rejected(tmp_path):
    write_dataset(tmp_path, TEXTS, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        read_source(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json cannot be read"):
        read_source(tmp_path)


@pytest.mark.parametrize("name", ["../secret/data-00000-of-00001.arrow", "/secret.arrow"])
def test_hugging_face_dataset_names_no_files_outside_of_its_folder(tmp_path, name):
    write_dataset(tmp_path / "secret", TEXTS, files=1)
    write_dataset(tmp_path / "set", TEXTS[:1], _data_files=[{"filename": name}])
    with pytest.raises(DataError, match=r"state\.json names .* which is outside of its folder"):
        read_source(tmp_path / "set")


def test_arrow_stream_cut_between_batches_is_reported(tmp_path):
    write_dataset(tmp_path, TEXTS[:100], files=1)
    path = tmp_path / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    with pa.OSFile(str(path)) as f, pa.ipc.open_stream(f) as stream:
        stream.read_next_batch()
        middle = f.tell()
    for length, row_count in [(middle, 50), (middle + 9, 50), (len(content) - 8, 100), (5, 0)]:
        path.write_bytes(content[:length])
        items, _ = read_source(tmp_path)
        assert document_texts(items) == TEXTS[:row_count]
        assert bad_lines(items) == [(row_count + 1, Reason.PART_LOST)]


@pytest.mark.parametrize("index", [3, 1 << 30, -1])
def test_arrow_stream_with_a_wrong_dictionary_index_loses_a_batch(tmp_path, index):
    indices = [pa.array(numbers, pa.int32()) for numbers in ([2, 0, 1], [0, index, 1])]
    columns = [pa.DictionaryArray.from_arrays(i, pa.array(TEXTS[:3]), safe=False) for i in indices]
    write_dataset(tmp_path, TEXTS[:3], files=1)
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", pa.schema([("text", columns[0].type)])) as out:
        for column in columns:
            out.write_batch(pa.record_batch([column], ["text"]))
    items, _ = read_source(tmp_path)
    assert document_texts(items) == [TEXTS[2], TEXTS[0], TEXTS[1]]
    assert bad_lines(items) == [(4, Reason.PART_LOST)]


@pytest.mark.parametrize("offsets", [[0, 1 << 30, 6, 9], [0, 3, -5, 9], [0, 3, 2, 9]])
def test_arrow_stream_with_wrong_offsets_loses_a_batch(tmp_path, offsets):
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(b"onetwosix")]
    column = pa.Array.from_buffers(pa.string(), 3, buffers)
    write_dataset(tmp_path, TEXTS[:4], files=1)
    batches = [pa.record_batch([pa.array(TEXTS[:4])], ["text"]), pa.record_batch([column], ["text"])]
    with pa.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", batches[0].schema) as out:
        for batch in batches:
            out.write_batch(batch)
    items, _ = read_source(tmp_path)
    assert document_texts(items) == TEXTS[:4]
    assert bad_lines(items) == [(5, Reason.PART_LOST)]


def test_hugging_face_dataset_reports_a_missing_file(tmp_path):
    write_dataset(tmp_path, TEXTS)
    (tmp_path / "data-00000-of-00002.arrow").unlink()
    items, _ = read_source(tmp_path)
    assert document_texts(items) == TEXTS[len(TEXTS) // 2 :]
    assert bad_lines(items) == [(1, Reason.PART_LOST)]
