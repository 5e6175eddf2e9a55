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
def test_samples_are_read_in_any_order_from_several_shards(tmp_path, token_bytes):
    rows = (np.arange(500 * 10).reshape(500, 10) % 60_000).astype(f"<u{token_bytes}")
    parts = np.split(rows, [35, 36, 400])
    made = [write_shard(tmp_path, f"d/{i}.arrow", part) for i, part in enumerate(parts)]
    assert [s.rows for s in made] == [35, 1, 364, 100]
    reader = ShardReader(tmp_path, made, token_bytes)
    assert len(reader) == 500
    index = np.random.default_rng(0).integers(0, 500, 200)
    read = reader.read(index)
    assert read.dtype == rows.dtype
    assert np.array_equal(read, rows[index])
    assert np.array_equal(reader.read(np.array([3, 3, 1])), rows[[3, 3, 1]])


def test_a_shard_is_an_ordinary_arrow_file(tmp_path):
    rows = np.arange(30, dtype="<u2").reshape(3, 10)
    write_shard(tmp_path, "a.arrow", rows)
    with pa.memory_map(str(tmp_path / "a.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert [np.frombuffer(value, "<u2").tolist() for value in table["tokens"].to_pylist()] == rows.tolist()


def test_a_vocabulary_leaves_room_for_the_padding_mark():
    assert token_bytes_for(65_535) == 2
    assert token_bytes_for(65_536) == 4
    assert padding_token(2) == 65_535


def test_a_shard_has_a_sample_however_long_it_is():
    assert rows_per_shard(2048, 2) == (64 << 20) // 4098
    assert rows_per_shard(100_000_000, 4) == 1


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_padding_is_token_0_to_a_model_and_counts_as_no_target(token_bytes):
    padding = padding_token(token_bytes)
    stored = np.array([[5, 0, 7, 8], [5, 9, padding, padding]], f"<u{token_bytes}")
    tokens, counts = split_padding(stored, token_bytes)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [[5, 0, 7, 8], [5, 9, 0, 0]]
    assert counts.tolist() == [[True, True, True], [True, False, False]]
