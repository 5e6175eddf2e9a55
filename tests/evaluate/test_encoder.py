"""Tests of the evaluation of encoders: the pairs that are read, and how much an image helps to predict its caption."""

import json

import numpy as np
import pytest

from mhmoe_ray.api.evaluation import EvaluationOptions
from mhmoe_ray.checkpoint.manifest import checkpoint_name, read_manifest
from mhmoe_ray.data.tokenizer import DocumentEncoder
from mhmoe_ray.data.tokenizer.train import train_bpe
from mhmoe_ray.evaluate.answer import EvaluationContext
from mhmoe_ray.families.encoder.data.samples import Pairs
from mhmoe_ray.families.encoder.evaluate.figures import encoder_figures
from mhmoe_ray.families.encoder.evaluate.meter import EncoderMeter, raw_pairs, with_few_captions
from mhmoe_ray.families.images.nearest import distinct_images
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.directory import create_run
from tests.data.sources.read import data_spec
from tests.serving.conftest import build_tokenizer
from tests.support.encoders import PADDING, encoder_spec
from tests.support.images import encode_image, make_images, tar_members, write_tar
from tests.support.saved import commit_checkpoint, save_tensors


def caption(*tokens):
    """Return the stored tokens of a caption."""
    return np.array([0, *tokens, *[PADDING] * (11 - len(tokens))], np.uint16)


def make_pairs(image_of, caption_of):
    """Return pairs of an image and a caption; equal numbers stand for equal images or equal captions."""
    images = [encode_image(np.full((16, 16, 3), 20 * number, np.uint8)) for number in range(max(image_of) + 1)]
    tokens = np.stack([caption(*range(1, 5), 10 + number) for number in caption_of])
    return Pairs("web/all", tokens, [images[number] for number in image_of], [None] * len(image_of))


@pytest.fixture(scope="module")
def meter():
    spec = encoder_spec(model__vocab_size=300)
    model = build_model(spec.model)
    init_weights(model, 0)
    return EncoderMeter(model.eval(), spec, use_bfloat16=False, on_progress=lambda *_: None)


def test_other_images_need_neither_the_prepared_data_nor_the_codebook(tmp_path):
    spec = encoder_spec(
        storage=str(tmp_path / "runs"),
        data__prepared=str(tmp_path / "removed"),
        model__encoder__image_targets="codebook",
        model__encoder__codebook_size=6,
    )
    run = create_run(spec)
    run.attempts_file.write_text("{}")
    build_tokenizer().save(str(run.tokenizer_file))
    model = build_model(spec.model).eval().requires_grad_(False)
    init_weights(model, 0)
    checkpoint = run.checkpoints / checkpoint_name(1, 1)
    checkpoint.mkdir(parents=True)
    save_tensors(checkpoint / "weights", model.named_tensors())
    commit_checkpoint(checkpoint, spec.model, seq_len=12)
    write_tar(tmp_path / "test" / "a.tar", tar_members(make_images(6)))
    options = EvaluationOptions(text=tmp_path / "test", overrides=["data.sources.test.format=webdataset"])
    request = options.request(run, checkpoint.name)
    lines = []
    context = EvaluationContext(request, run, checkpoint, read_manifest(checkpoint), lines.append, lambda *_: None)
    figures = encoder_figures(context)["encoder"]
    assert figures.losses == {}
    assert figures.image_values["test/all"].pairs == 6
    assert figures.retrieval["test/all"].baseline is None
    assert lines == [f"no nearest neighbours: the training's data is not in {tmp_path / 'removed'}"]


def test_other_images_are_others_and_have_other_captions(meter, monkeypatch):
    shown_images = []
    image_of, caption_of = [0, 0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5, 0, 6]
    pairs = make_pairs(image_of, caption_of)
    measure_sums = meter._sums
    monkeypatch.setattr(
        meter,
        "_sums",
        lambda name, part, samples: shown_images.append(samples.images) or measure_sums(name, part, samples),
    )
    value = meter.image_value(pairs)
    assert value.pairs == 8
    own_images, other_images, no_images = ([image[0, 0, 0] for image in images] for images in shown_images)
    assert own_images == [20 * number for number in image_of]
    assert no_images == []
    captions_of_image = {
        20 * image: {c for i, c in zip(image_of, caption_of, strict=True) if i == image} for image in range(3)
    }
    for own_image, other_image, number in zip(own_images, other_images, caption_of, strict=True):
        assert other_image != own_image
        assert captions_of_image[other_image] - {number}


@pytest.mark.parametrize(("image_of", "caption_of"), [([0, 0], [0, 1]), ([0, 1], [0, 0]), ([0, 0, 1], [0, 1, 0])])
def test_without_another_image_there_is_no_value(meter, image_of, caption_of):
    assert meter.image_value(make_pairs(image_of, caption_of)) is None


def test_an_image_is_measured_on_a_few_of_its_captions(meter):
    pairs = with_few_captions(make_pairs([0] * 20 + [1] * 3, [*range(20), *range(3)]))
    assert distinct_images(pairs.images)[1].tolist() == [0] * 5 + [1] * 3
    assert (pairs.tokens[:, 5] - 10).tolist() == [0, 4, 8, 12, 16, 0, 1, 2]
    assert len(pairs.languages) == 8


def test_samples_of_images_are_different_images_with_all_captions(tmp_path):
    members = []
    for number, picture in enumerate(make_images(5)):
        suffix = picture.name.partition(".")[2]
        names = {language: f"{language} {number}" for language in ("en", "de", "fr")}
        members += [(f"{number}.{suffix}", picture.image), (f"{number}.json", json.dumps({"names": names}).encode())]
    write_tar(tmp_path / "a.tar", members[:6])
    # The second file begins with an image that the first one has, too.
    write_tar(tmp_path / "b.tar", members[4:])
    data = data_spec(tmp_path, format="webdataset", text_field="json.names")
    encoder = DocumentEncoder(train_bpe(["some text"], 280))
    [pairs] = raw_pairs(data, encoder, encoder_spec(), 4)
    assert distinct_images(pairs.images)[1].tolist() == [0] * 3 + [1] * 3 + [2] * 6 + [3] * 3
    assert pairs.languages == ["en", "de", "fr"] * 5
    [pairs] = raw_pairs(data, encoder, encoder_spec(), 1)
    assert len(pairs.images) == 3
