import numpy as np
import pyarrow as pa
import pytest

from mhmoe_ray.data.shards.files import (
    ShardReader,
    padding_token,
    rows_per_shard,
    split_padding,
    token_bytes_for,
    write_shard,
)


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_shard_reader_reads_samples_in_any_order(tmp_path, token_bytes):
    rows = (np.arange(500 * 10).reshape(500, 10) % 60_000).astype(f"<u{token_bytes}")
    parts = np.split(rows, [35, 36, 400])
    shards = [write_shard(tmp_path, f"d/{i}.arrow", part) for i, part in enumerate(parts)]
    assert [s.rows for s in shards] == [35, 1, 364, 100]
    reader = ShardReader(tmp_path, shards, token_bytes)
    assert len(reader) == 500
    indices = np.random.default_rng(0).integers(0, 500, 200)
    actual = reader.read(indices)
    assert actual.dtype == rows.dtype
    assert np.array_equal(actual, rows[indices])
    assert np.array_equal(reader.read(np.array([3, 3, 1])), rows[[3, 3, 1]])


def test_write_shard_writes_an_arrow_file(tmp_path):
    rows = np.arange(30, dtype="<u2").reshape(3, 10)
    write_shard(tmp_path, "a.arrow", rows)
    with pa.memory_map(str(tmp_path / "a.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert [np.frombuffer(value, "<u2").tolist() for value in table["tokens"].to_pylist()] == rows.tolist()


def test_token_bytes_leave_room_for_the_padding_token():
    assert token_bytes_for(65_535) == 2
    assert token_bytes_for(65_536) == 4
    assert padding_token(2) == 65_535


def test_rows_per_shard_is_at_least_one():
    assert rows_per_shard(2048, 2) == (64 << 20) // 4098
    assert rows_per_shard(100_000_000, 4) == 1


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_split_padding_masks_padding_and_makes_it_token_0(token_bytes):
    padding = padding_token(token_bytes)
    stored_tokens = np.array([[5, 0, 7, 8], [5, 9, padding, padding]], f"<u{token_bytes}")
    tokens, target_mask = split_padding(stored_tokens, token_bytes)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [[5, 0, 7, 8], [5, 9, 0, 0]]
    assert target_mask.tolist() == [[True, True, True], [True, False, False]]
