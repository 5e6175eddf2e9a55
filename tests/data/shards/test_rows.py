"""Tests of the shards of an encoder's rows."""

from itertools import pairwise

import numpy as np

from mhmoe_ray.data.shards.rows import RowReader, file_content, join_batches, map_rows, row_batch, write_row_shard

TOKENS = np.arange(40, dtype="<u2").reshape(10, 4)
IMAGES = [bytes([number]) * (number * 7) for number in range(10)]


def test_rows_are_read_by_number_from_several_shards(tmp_path):
    shards = [
        write_row_shard(tmp_path, f"{start}.arrow", row_batch(TOKENS[start:stop], IMAGES[start:stop]))
        for start, stop in ((0, 3), (3, 4), (4, 10))
    ]
    reader = RowReader(tmp_path, shards, 2)
    assert len(reader) == 10
    for numbers in ([0], [9, 0, 3, 3, 5], [*range(10)]):
        tokens, images = reader.read(np.array(numbers))
        assert tokens.dtype == np.dtype("<u2")
        assert np.array_equal(tokens, TOKENS[numbers])
        assert images == [IMAGES[number] for number in numbers]


def test_bytes_of_a_shard_depend_on_its_rows_only(tmp_path):
    """The rows come from slices of other files, as they do in preparation."""
    write_row_shard(tmp_path, "a.arrow", row_batch(TOKENS, IMAGES))
    batch = map_rows(tmp_path / "a.arrow")
    expected = file_content(row_batch(TOKENS[2:7], IMAGES[2:7]))
    for cuts in ([2, 7], [2, 3, 7], [2, 5, 6, 7]):
        slices = [batch.slice(start, stop - start) for start, stop in pairwise(cuts)]
        assert file_content(join_batches(slices)) == expected


def test_an_image_with_many_captions_is_stored_once(tmp_path):
    images = [b"a" * 10_000, b"a" * 10_000, b"", b"b" * 10_000, b"a" * 10_000, b""]
    batch = row_batch(TOKENS[:6], images)
    shard = write_row_shard(tmp_path, "a.arrow", join_batches([batch, batch.slice(4, 1)]))
    assert (tmp_path / "a.arrow").stat().st_size < 22_000
    tokens, read_images = RowReader(tmp_path, [shard], 2).read(np.arange(7))
    assert read_images == [*images, images[4]]
    assert np.array_equal(tokens, TOKENS[[0, 1, 2, 3, 4, 5, 4]])
    assert file_content(join_batches([batch.slice(1, 2)])) == file_content(row_batch(TOKENS[1:3], images[1:3]))
