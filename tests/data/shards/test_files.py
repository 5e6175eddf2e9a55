import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from mhmoe_ray.data.shards.columns import (
    DOCUMENT_STARTS,
    TARGETS,
    TOKENS,
    columns_of,
    conversation_dtype,
    join_columns,
    padding_token,
    to_model_samples,
    token_bytes_for,
    with_all_columns,
)
from mhmoe_ray.data.shards.files import rows_per_shard, to_batch, write_shard
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.train.objectives.next_token import sample_digest
from tests.data.shards.manifests import make_manifest


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_shard_reader_reads_samples_in_any_order(tmp_path, token_bytes):
    rows = (np.arange(500 * 10).reshape(500, 10) % 60_000).astype(f"<u{token_bytes}")
    parts = np.split(rows, [35, 36, 400])
    shards = [write_shard(tmp_path, f"d/{i}.arrow", to_batch(columns_of(part))) for i, part in enumerate(parts)]
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
    write_shard(tmp_path, "a.arrow", to_batch({TOKENS: rows}))
    with pa.memory_map(str(tmp_path / "a.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert [np.frombuffer(value, "<u2").tolist() for value in table["tokens"].to_pylist()] == rows.tolist()


def test_shards_of_text_have_the_bytes_of_earlier_versions(tmp_path):
    """Runs that an earlier version started can be continued, because their shards and digests stay valid."""
    rows = (np.arange(3 * 17).reshape(3, 17) * 977 % 60_000).astype("<u2")
    shard = write_shard(tmp_path, "a.arrow", to_batch({TOKENS: rows}))
    assert shard.sha256 == "d29f8c034adc8fb5940a94171c07b1525ac2879ffc492f4a463e5e3282762c84"
    assert sample_digest(rows) == 185014230202366
    manifest = json.dumps(make_manifest({"web/a": 3}).model_dump(mode="json"))
    manifest_hash = "242e41af0b8e1406e673a566a82864a80cc8c8323a38b2cdedaf4a9afcdbd62d"
    assert hashlib.sha256(manifest.encode()).hexdigest() == manifest_hash


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_shard_reader_reads_all_columns_of_conversations(tmp_path, token_bytes):
    generator = np.random.default_rng(0)
    rows = np.empty((60, 21), conversation_dtype(token_bytes))
    rows[TOKENS] = generator.integers(0, 60_000, rows.shape)
    rows[TARGETS], rows[DOCUMENT_STARTS] = generator.random((2, *rows.shape)) < 0.5
    shards = [
        write_shard(tmp_path, f"{i}.arrow", to_batch(columns_of(part)))
        for i, part in enumerate(np.split(rows, [7, 50]))
    ]
    indices = generator.integers(0, 60, 40)
    actual = ShardReader(tmp_path, shards, token_bytes).read(indices)
    assert actual.dtype == rows.dtype
    assert np.array_equal(actual, rows[indices])
    with pa.memory_map(str(tmp_path / "0.arrow")) as source:
        schema = pa.ipc.open_file(source).schema
    # 21 bits need three bytes.
    widths = {TOKENS: 21 * token_bytes, TARGETS: 3, DOCUMENT_STARTS: 3}
    assert {field.name: field.type for field in schema} == {name: pa.binary(width) for name, width in widths.items()}


def test_columns_of_samples_join_to_the_samples():
    rows = np.zeros((2, 3), conversation_dtype(2))
    rows[TOKENS] = [[5, 6, 7], [5, 9, 65_535]]
    rows[TARGETS] = [[False, True, False], [True, False, False]]
    assert np.array_equal(join_columns(columns_of(rows) | {"position": np.arange(2)}), rows)
    text_rows = rows[TOKENS]
    assert np.array_equal(join_columns(columns_of(text_rows)), text_rows)
    all_rows = with_all_columns(text_rows, start=5, padding=65_535)
    assert all_rows[TARGETS].tolist() == [[True, True, True], [True, True, False]]
    assert all_rows[DOCUMENT_STARTS].tolist() == [[True, False, False]] * 2
    assert np.array_equal(with_all_columns(rows, start=5, padding=65_535), rows)
    # Samples have different digests if any of their columns differs.
    assert len({sample_digest(rows), sample_digest(text_rows), sample_digest(all_rows)}) == 3


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
    tokens, target_mask, document_starts, experts = to_model_samples(stored_tokens, token_bytes)
    assert document_starts is experts is None
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [[5, 0, 7, 8], [5, 9, 0, 0]]
    assert target_mask.tolist() == [[True, True, True], [True, False, False]]
    rows = with_all_columns(stored_tokens, start=5, padding=padding)
    rows[TARGETS][0, 2] = False
    rows[DOCUMENT_STARTS][0, 1] = True
    tokens_of_rows, target_mask, document_starts, _ = to_model_samples(rows, token_bytes)
    assert np.array_equal(tokens_of_rows, tokens)
    assert target_mask.tolist() == [[True, False, True], [True, False, False]]
    assert document_starts.tolist() == [[True, True, False], [True, False, False]]
