"""Tests of the shards of an encoder's rows."""

from itertools import pairwise

import numpy as np

from mhmoe_ray.data.shards.columns import IMAGE, TOKENS
from mhmoe_ray.data.shards.files import file_content, join_batches, open_batch, to_batch, write_shard
from mhmoe_ray.data.shards.reader import ShardReader

TOKEN_ROWS = np.arange(40, dtype="<u2").reshape(10, 4)
IMAGES = [bytes([number]) * (number * 7) for number in range(10)]


def test_rows_are_read_by_number_from_several_shards(tmp_path):
    shards = [
        write_shard(tmp_path, f"{start}.arrow", to_batch({TOKENS: TOKEN_ROWS[start:stop], IMAGE: IMAGES[start:stop]}))
        for start, stop in ((0, 3), (3, 4), (4, 10))
    ]
    reader = ShardReader(tmp_path, shards, 2)
    assert len(reader) == 10
    for numbers in ([0], [9, 0, 3, 3, 5], [*range(10)]):
        tokens, images = reader.read(np.array(numbers)), reader.read_values(IMAGE, np.array(numbers))
        assert tokens.dtype == np.dtype("<u2")
        assert np.array_equal(tokens, TOKEN_ROWS[numbers])
        assert images == [IMAGES[number] for number in numbers]


def test_no_rows_have_the_shape_of_others(tmp_path):
    reader = ShardReader(tmp_path, [write_shard(tmp_path, "a.arrow", to_batch({TOKENS: TOKEN_ROWS, IMAGE: IMAGES}))], 2)
    tokens = reader.read(np.arange(0))
    assert (tokens.shape, tokens.dtype) == ((0, 4), np.dtype("<u2"))
    assert reader.read_values(IMAGE, np.arange(0)) == []


def test_bytes_of_a_shard_depend_on_its_rows_only(tmp_path):
    """The rows come from slices of other files, as they do in preparation."""
    write_shard(tmp_path, "a.arrow", to_batch({TOKENS: TOKEN_ROWS, IMAGE: IMAGES}))
    batch = open_batch(tmp_path / "a.arrow")
    expected = file_content(to_batch({TOKENS: TOKEN_ROWS[2:7], IMAGE: IMAGES[2:7]}))
    for cuts in ([2, 7], [2, 3, 7], [2, 5, 6, 7]):
        slices = [batch.slice(start, stop - start) for start, stop in pairwise(cuts)]
        assert file_content(join_batches(slices)) == expected


def test_an_image_with_many_captions_is_stored_once(tmp_path):
    images = [b"a" * 10_000, b"a" * 10_000, b"", b"b" * 10_000, b"a" * 10_000, b""]
    batch = to_batch({TOKENS: TOKEN_ROWS[:6], IMAGE: images})
    shard = write_shard(tmp_path, "a.arrow", join_batches([batch, batch.slice(4, 1)]))
    assert (tmp_path / "a.arrow").stat().st_size < 22_000
    reader = ShardReader(tmp_path, [shard], 2)
    tokens, read_images = reader.read(np.arange(7)), reader.read_values(IMAGE, np.arange(7))
    assert read_images == [*images, images[4]]
    assert np.array_equal(tokens, TOKEN_ROWS[[0, 1, 2, 3, 4, 5, 4]])
    assert file_content(join_batches([batch.slice(1, 2)])) == file_content(
        to_batch({TOKENS: TOKEN_ROWS[1:3], IMAGE: images[1:3]})
    )
