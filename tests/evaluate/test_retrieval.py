"""Tests of retrieval between images and captions, and of its baseline, the nearest images of the training data."""

import numpy as np
import pytest
import torch

from mhmoe_ray.data.shards.columns import IMAGE, TOKENS
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.families.encoder.data.samples import SampleMaker
from mhmoe_ray.families.encoder.evaluate.meter import EncoderMeter
from mhmoe_ray.families.encoder.evaluate.retrieval import (
    Candidates,
    nearest_scores,
    recall,
    retrieval_figures,
    score_retrieval,
)
from mhmoe_ray.families.images.crops import read_crop
from mhmoe_ray.families.images.nearest import NearestImages, distinct_images
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from tests.support.encoders import PADDING, encoder_spec
from tests.support.images import encode_image


def caption(*tokens):
    """Return the stored tokens of a caption."""
    return np.array([0, *tokens, *[PADDING] * (11 - len(tokens))], np.uint16)


def flat_image(*colour, size=16):
    return encode_image(np.full((size, size, 3), colour, np.uint8))


RED, GREEN, BLUE = flat_image(255, 0, 0), flat_image(0, 255, 0), flat_image(0, 0, 255)
ROSE, LIME = flat_image(250, 60, 60), flat_image(60, 250, 60)


def test_an_image_is_found_at_the_rank_of_its_best_caption():
    scores = np.array([[0.9, 0.8, 0.7], [0.1, 0.5, 0.4], [0.3, 0.2, 0.1]])
    fits = np.array([[False, True, True], [False, True, False], [False, False, True]])
    result = recall(scores, fits)
    assert (result.at_1, result.at_5) == (pytest.approx(1 / 3), 1)
    # If all scores are equal, wrong candidates come before the right one.
    assert recall(np.zeros((3, 3)), np.eye(3, dtype=bool)).at_1 == 0
    assert recall(np.full((3, 3), np.nan), np.eye(3, dtype=bool)).at_1 == 0


def test_equal_images_and_equal_captions_count_once():
    images = [RED, GREEN, RED, BLUE]
    tokens = np.stack([caption(1), caption(2), caption(3), caption(2)])
    candidates = Candidates.of_pairs(images, tokens)
    assert candidates.images == [RED, GREEN, BLUE]
    assert candidates.captions[:, 1].tolist() == [1, 2, 3]
    assert candidates.fits.tolist() == [[True, False, True], [False, True, False], [False, True, False]]
    assert distinct_images(images)[1].tolist() == [0, 1, 0, 2]


def test_a_caption_is_as_near_as_the_nearest_image_of_the_training_with_it():
    """The scores equal those that follow from the definition, computed for one training image at a time."""
    rng = np.random.default_rng(0)
    training = [encode_image(rng.integers(0, 256, (20, 16, 3), np.uint8)) for _ in range(12)]
    training_tokens = np.stack([caption(1 + number % 5) for number in range(12)])
    queries = [encode_image(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(4)]
    candidates = Candidates.of_pairs(queries, np.stack([caption(1), caption(2), caption(3), caption(9)]))
    training_images = NearestImages(training)
    scores = nearest_scores(candidates, training_images, training_tokens)
    single_scores = [
        training_images.scores(queries, np.where(np.arange(12) == number, 0, -1), 1)[:, 0] for number in range(12)
    ]
    for row in range(4):
        for column, token in enumerate((1, 2, 3)):
            expected = max(single_scores[number][row] for number in range(12) if training_tokens[number][1] == token)
            assert scores[row, column] == pytest.approx(expected, rel=1e-4)
        assert scores[row, 3] == -np.inf


def test_equal_blocks_of_scores_give_the_same_scores(monkeypatch):
    rng = np.random.default_rng(0)
    images = [encode_image(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(10)]
    labels = np.arange(10) % 3
    expected = NearestImages(images).scores(images, labels, 3)
    monkeypatch.setattr("mhmoe_ray.families.images.nearest.BLOCK_SCORES", 25)
    assert (NearestImages(images).scores(images, labels, 3) == expected).all()


def test_neighbours_are_an_evenly_spaced_selection_of_the_different_training_images(tmp_path, monkeypatch):
    """Training rows that share an image count as one image, and rows whose image is not selected are not compared."""
    # Each image has two captions, and the last one of a shard comes again in the next shard.
    # No image has the same distance to two others, because rounding would then decide which of the two is nearer.
    greys = [flat_image(*[4 * number**2] * 3) for number in range(8)]
    shards = [[0, 0, 1, 1, 2, 2], [2, 3, 3, 4, 4], [5, 5, 6, 6, 7, 7]]
    files = []
    for number, images in enumerate(shards):
        batch = to_batch({TOKENS: np.stack([caption(i) for i in images]), IMAGE: [greys[i] for i in images]})
        files.append(write_shard(tmp_path, f"{number}.arrow", batch))
    reader = ShardReader(tmp_path, files, 2)
    assert reader.image_numbers().tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    labels = reader.read(np.arange(len(reader)))[:, 1].astype(np.int64)
    neighbours = NearestImages.of_training(reader)
    assert neighbours.image_count == 8
    assert labels[neighbours.nearest_samples(greys)].tolist() == [*range(8)]
    assert neighbours.scores(greys, labels, 8).argmax(1).tolist() == [*range(8)]

    decoded_images = []
    monkeypatch.setattr("mhmoe_ray.families.images.nearest.MAX_IMAGES", 3)
    monkeypatch.setattr(
        "mhmoe_ray.families.images.nearest.read_crop",
        lambda image, size: decoded_images.append(greys.index(image)) or read_crop(image, size),
    )
    neighbours = NearestImages.of_training(reader)
    # The image 2 stands in two shards, so it counts twice among the nine stored images.
    assert decoded_images == [0, 3, 7]
    assert neighbours.image_count == 3
    assert labels[neighbours.nearest_samples(greys)].tolist() == [0, 0, 0, 3, 3, 3, 7, 7]
    assert np.isfinite(neighbours.scores(greys, labels, 8)).all(0).tolist() == [
        number in (0, 3, 7) for number in range(8)
    ]


def test_the_baseline_names_images_that_look_like_those_of_the_training():
    training_tokens = np.stack([caption(1), caption(2), caption(3)])
    training_images = NearestImages([RED, GREEN, BLUE])
    figures = retrieval_figures(
        [ROSE, LIME, ROSE, LIME],
        np.stack([caption(1), caption(2), caption(7), caption(8)]),
        ["en", "en", "de", "de"],
        lambda candidates: np.ones(candidates.fits.shape),
        lambda candidates: nearest_scores(candidates, training_images, training_tokens),
    )
    assert figures.languages["en"].baseline.image_to_text.at_1 == 1
    assert figures.languages["en"].baseline.text_to_image.at_1 == 1
    # No image of the training has a German name.
    assert figures.languages["de"].baseline.image_to_text.at_1 == 0
    assert figures.model.image_to_text.at_1 == 0
    assert (figures.baseline.images, figures.baseline.captions) == (2, 4)


def test_similarities_are_the_cosines_of_the_matching_objective():
    """The loss of the contrastive objective for the same pairs follows from the similarities."""
    spec = encoder_spec(model__vocab_size=300)
    model = build_model(spec.model)
    init_weights(model, 0)
    meter = EncoderMeter(model.eval(), spec, use_bfloat16=False, on_progress=lambda *_: None)
    tokens = np.stack([caption(*range(5, 6 + number)) for number in range(5)])
    candidates = Candidates.of_pairs([RED, GREEN, BLUE, ROSE, LIME], tokens)
    scores = meter.similarities(candidates)
    assert scores.shape == (5, 5)
    assert np.abs(scores).max() <= 1 + 1e-6
    part = next(part for part in spec.parts if part.objective == "contrastive")._replace(samples=5)
    samples = SampleMaker(spec, 2).make(
        part, {TOKENS: candidates.captions, IMAGE: candidates.images}, [""] * 5, crops=False
    )
    [loss] = model(BatchMaker(spec.model, torch.device("cpu")).make([part], samples)).losses
    logits = torch.from_numpy(scores) * model.match.log_scale.exp()
    targets = torch.arange(5)
    expected = [torch.nn.functional.cross_entropy(values, targets, reduction="none") for values in (logits, logits.T)]
    torch.testing.assert_close(loss.value_I, torch.stack(expected).mean(0).detach(), rtol=1e-4, atol=1e-4)
    assert score_retrieval(candidates, meter.similarities).images == 5
