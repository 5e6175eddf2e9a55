"""Tests of the scores of answers and of sentences, and of their baselines."""

import numpy as np
import pytest

from mhmoe_ray.data.images.annotations import Annotation
from mhmoe_ray.families.encoder.data.samples import Pairs
from mhmoe_ray.families.encoder.evaluate.answers import (
    TrainingAnswers,
    answer_figures,
    language_answers,
    nearest_answers,
    sample_images,
    score_answers,
)
from mhmoe_ray.families.images.nearest import NearestImages
from tests.support.images import encode_image

DARK, GREY, LIGHT = (encode_image(np.full((16, 16, 3), value, np.uint8)) for value in (10, 120, 240))


def caption(token):
    return np.array([0, token], np.uint16)


def question(answer, count=10):
    return Annotation(answer, image_id=1, answers=(answer,) * count + ("other",) * (10 - count))


def sentence(label, identifier):
    return Annotation(label, image_id=identifier)


def training(tokens, answers, images, second_images=()):
    return TrainingAnswers(np.stack(tokens), answers, NearestImages(sample_images(images, second_images)))


def test_answers_are_scored_by_agreement():
    score = score_answers(["yes", "two", "no"], [question("yes"), question("2", 2), question("yes")])
    assert score.accuracy == pytest.approx((1 + (2 / 3 * 8 + 1 / 3 * 2) / 10 + 0) / 3)
    assert (score.samples, score.consistency) == (3, None)


def test_a_sentence_is_consistent_if_all_its_pairs_are_right():
    labels = [sentence("True", "dev-1-0"), sentence("False", "dev-1-0"), sentence("True", "dev-2-0")]
    score = score_answers(["True", "True", "True"], labels)
    assert (score.accuracy, score.consistency) == (pytest.approx(2 / 3), 0.5)


def test_language_alone_gives_the_most_frequent_answer_to_the_same_text():
    samples = training(
        [caption(1), caption(1), caption(1), caption(2), caption(2)], ["a", "b", "b", "a", "a"], [DARK] * 5
    )
    assert language_answers(np.stack([caption(1), caption(2), caption(3)]), samples) == ["b", "a", "a"]


def test_the_nearest_image_is_one_with_the_same_text():
    samples = training([caption(1), caption(1), caption(2)], ["dark", "light", "grey"], [DARK, LIGHT, GREY])
    pairs = Pairs("web/all", np.stack([caption(1), caption(1), caption(2), caption(3)]), [GREY, LIGHT, DARK, GREY], [])
    assert nearest_answers(pairs, samples)[1:] == ["light", "grey", "grey"]
    assert nearest_answers(pairs, samples)[0] in ("dark", "light")


def test_the_nearest_pair_is_near_in_both_images():
    samples = training([caption(1)] * 3, ["x", "y", "z"], [DARK, DARK, LIGHT], [DARK, LIGHT, DARK])
    pairs = Pairs("web/all", np.stack([caption(1)] * 3), [DARK, LIGHT, DARK], [], [LIGHT, DARK, DARK])
    assert nearest_answers(pairs, samples) == ["y", "z", "x"]


def test_figures_have_the_model_without_images_and_both_baselines():
    samples = training([caption(1), caption(1)], ["yes", "no"], [DARK, LIGHT])
    pairs = Pairs("web/all", np.stack([caption(1)]), [LIGHT], [], annotations=[question("no")])
    figures = answer_figures(pairs, ["no"], ["yes"], samples)
    assert [s.accuracy for s in (figures.model, figures.blank, figures.language, figures.nearest_image)] == [1, 0, 0, 1]
    assert [row[0] for row in figures.table("web").rows][2:] == ["  language alone", "  nearest pixels"]
    assert answer_figures(pairs, ["no"], ["yes"], None).language is None
