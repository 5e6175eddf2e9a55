"""Tests of the held-out samples of an encoder."""

import numpy as np
import pytest

from mhmoe_ray.data.samples import held_out_samples
from mhmoe_ray.data.shards.columns import IMAGE, TOKENS
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.shards.manifest import DataManifest, Domain
from mhmoe_ray.families.encoder.data.samples import SampleMaker
from mhmoe_ray.families.images.crops import read_crop
from tests.support.encoders import PADDING, encoder_spec
from tests.support.images import make_images

COUNTS = {"captions": 4, "pictures": 5, "described": 7, "matched": 0}
IMAGES = [picture.image for picture in make_images(12)]


@pytest.fixture
def prepared(tmp_path):
    """Return a spec with the manifest of its held-out samples, their tokens and their images."""
    rng = np.random.default_rng(0)
    tokens = np.full((16, 12), PADDING, np.uint16)
    tokens[:, 0] = 0
    for row in tokens:
        length = int(rng.integers(2, 11))
        row[1 : 1 + length] = rng.integers(1, 290, length)
    tokens[4:9] = PADDING
    images = [b""] * 4 + IMAGES
    shards = [
        write_shard(tmp_path, f"{start}.arrow", to_batch({TOKENS: tokens[start:stop], IMAGE: images[start:stop]}))
        for start, stop in ((0, 6), (6, 16))
    ]
    domains = {f"{name}/all": Domain.model_construct(validation_samples=count) for name, count in COUNTS.items()}
    manifest = DataManifest.model_construct(token_bytes=2, domains=domains, validation=shards)
    return encoder_spec(data__prepared=str(tmp_path)), manifest, tokens, images


def test_held_out_samples_are_decoded_micro_batch_by_micro_batch(prepared, monkeypatch):
    spec, manifest, _, images = prepared
    decoded_images = []
    monkeypatch.setattr(
        "mhmoe_ray.families.encoder.data.samples.read_crop",
        lambda content, *arguments: decoded_images.append(content) or read_crop(content, *arguments),
    )
    samples = held_out_samples(spec, manifest)
    assert {name: part_samples.sample_count for name, part_samples in samples.items()} == {
        "texts": 4,
        "images": 5,
        "pairs": 7,
    }
    assert decoded_images == []
    samples["pairs"].rows(2, 5)
    assert decoded_images == images[11:14]


@pytest.mark.parametrize(("name", "rows"), [("texts", slice(0, 4)), ("images", slice(4, 9)), ("pairs", slice(9, 16))])
def test_held_out_samples_are_the_same_in_any_micro_batches(prepared, name, rows):
    spec, manifest, tokens, images = prepared
    part = next(part for part in spec.parts if part.name == name)
    samples = held_out_samples(spec, manifest)[name]
    count = samples.sample_count
    labels = [f"validation {name} {number}" for number in range(count)]
    expected = SampleMaker(spec, 2).make(part, {TOKENS: tokens[rows], IMAGE: images[rows]}, labels, crops=False)
    for size in (1, 3, count):
        for start in range(0, count, size):
            stop = min(count, start + size)
            columns = zip(samples.rows(start, stop), expected.rows(start, stop), strict=True)
            assert all(np.array_equal(column, expected_column) for column, expected_column in columns)
    # A rank without samples has empty columns of the same types.
    for column, expected_column in zip(samples.rows(count, count), expected.rows(0, 0), strict=True):
        assert (column.shape, column.dtype) == (expected_column.shape, expected_column.dtype)
