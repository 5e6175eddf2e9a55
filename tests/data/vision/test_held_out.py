"""Tests of the held-out samples of a vision model."""

import json

import numpy as np
import pytest

from mhmoe_ray.data.images.annotations import Annotation, Instance, pack
from mhmoe_ray.data.images.files import decode_image
from mhmoe_ray.data.samples import held_out_samples, stored_held_out
from mhmoe_ray.data.shards.columns import ANNOTATION, IMAGE
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.shards.manifest import DataManifest, Domain
from tests.support.images import make_images
from tests.support.visions import vision_spec

IMAGES = [picture.image for picture in make_images(9)]
CLASSES = {"classify": ["cat", "cow"], "detect": ["circle"]}
ANNOTATIONS = [pack(Annotation(CLASSES["classify"][number % 2])) for number in range(5)]
ANNOTATIONS += [
    pack(Annotation(instances=(Instance("circle", (0.0, 0.0, 8.0 + number, 8.0), None),))) for number in range(4)
]


@pytest.fixture
def prepared(tmp_path):
    """Return a spec with the manifest of its held-out samples, which are in two shards."""
    shards = [
        write_shard(
            tmp_path, f"{start}.arrow", to_batch({IMAGE: IMAGES[start:stop], ANNOTATION: ANNOTATIONS[start:stop]})
        )
        for start, stop in ((0, 3), (3, 9))
    ]
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    counts = {"drawings/all": 5, "scenes/all": 4}
    domains = {name: Domain.model_construct(validation_samples=count) for name, count in counts.items()}
    manifest = DataManifest.model_construct(token_bytes=2, domains=domains, validation=shards)
    return vision_spec(data__prepared=str(tmp_path)), manifest


def test_held_out_images_are_those_of_the_sources_of_a_task(prepared):
    stored = stored_held_out(*prepared, (IMAGE, ANNOTATION))
    assert stored.keys() == CLASSES.keys()
    assert [*stored["classify"][IMAGE]] == IMAGES[:5]
    assert stored["detect"][IMAGE][2] == IMAGES[7]
    assert [*stored["detect"][ANNOTATION]] == ANNOTATIONS[5:]


def test_held_out_samples_are_decoded_micro_batch_by_micro_batch(prepared, monkeypatch):
    decoded_images = []
    monkeypatch.setattr(
        "mhmoe_ray.families.vision.data.samples.decode_image",
        lambda content: decoded_images.append(content) or decode_image(content),
    )
    samples = held_out_samples(*prepared)
    assert {name: task_samples.sample_count for name, task_samples in samples.items()} == {"classify": 5, "detect": 4}
    assert decoded_images == []
    assert samples["classify"].rows(2, 5).classes.tolist() == [0, 1, 0]
    assert decoded_images == IMAGES[2:5]
    assert samples["detect"].rows(1, 3).objects[0].classes.tolist() == [0]
    # A rank without samples has no images.
    assert samples["detect"].rows(4, 4).images.shape == (0, 32, 32, 3)
    assert decoded_images == [*IMAGES[2:5], *IMAGES[6:8]]


def test_held_out_samples_are_the_same_in_any_micro_batches(prepared):
    samples = held_out_samples(*prepared)["detect"]
    all_samples = samples.rows(0, 4)
    for start, stop in ((0, 2), (2, 3), (3, 4)):
        part = samples.rows(start, stop)
        assert np.array_equal(part.images, all_samples.images[start:stop])
        for objects, expected in zip(part.objects, all_samples.objects[start:stop], strict=True):
            assert all(map(np.array_equal, objects, expected))
