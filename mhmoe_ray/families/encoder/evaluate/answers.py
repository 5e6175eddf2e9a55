"""Evaluation of answers to questions and of the truth of sentences, beside baselines without a model.

One baseline reads the language alone: it gives the most frequent answer to the same text in the training data, or the
most frequent one of all. The other gives the answer of the nearest training image in pixels with the same text.
"""

import io
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.images.annotations import Annotation
from mhmoe_ray.data.sources.answer_text import answer_accuracy
from mhmoe_ray.evaluate.score import AnswerFigures, AnswerScore
from mhmoe_ray.families.encoder.data.samples import Pairs
from mhmoe_ray.families.images.crops import read_crop
from mhmoe_ray.families.images.nearest import SIZE, NearestImages


class TrainingAnswers(NamedTuple):
    """Training questions or sentences of one part, and their answers."""

    tokens: np.ndarray
    """Stored tokens of the texts, (samples, T)."""
    answers: list[str]
    neighbours: NearestImages


def answer_figures(
    pairs: Pairs, answers: Sequence[str], blank_answers: Sequence[str], training: TrainingAnswers | None
) -> AnswerFigures:
    """Return the scores of a model's answers, of those that it gives without seeing images, and of the baselines."""
    language = nearest_image = None
    if training is not None:
        language = score_answers(language_answers(pairs.tokens, training), pairs.annotations)
        nearest_image = score_answers(nearest_answers(pairs, training), pairs.annotations)
    return AnswerFigures(
        model=score_answers(answers, pairs.annotations),
        blank=score_answers(blank_answers, pairs.annotations),
        language=language,
        nearest_image=nearest_image,
    )


def score_answers(answers: Sequence[str], annotations: Sequence[Annotation]) -> AnswerScore:
    """Return the official accuracy of answers to questions (VQAv2), or accuracy and consistency of sentences (NLVR2).

    A sentence is consistent if its truth is right for all its pairs of images.
    """
    if annotations[0].answers:
        accuracies = [answer_accuracy(a, label.answers) for a, label in zip(answers, annotations, strict=True)]
        return AnswerScore(samples=len(answers), accuracy=float(np.mean(accuracies)), consistency=None)
    is_right = [answer == label.class_name for answer, label in zip(answers, annotations, strict=True)]
    is_consistent = dict[int | str | None, bool]()
    for label, right in zip(annotations, is_right, strict=True):
        is_consistent[label.image_id] = is_consistent.get(label.image_id, True) and right
    consistency = float(np.mean([*is_consistent.values()]))
    return AnswerScore(samples=len(answers), accuracy=float(np.mean(is_right)), consistency=consistency)


def language_answers(tokens: np.ndarray, training: TrainingAnswers) -> list[str]:
    """Return the most frequent training answer to each text, or to any text if the training has not the same one."""
    by_text = dict[bytes, Counter[str]]()
    for row, answer in zip(training.tokens, training.answers, strict=True):
        by_text.setdefault(row.tobytes(), Counter())[answer] += 1
    overall = Counter(training.answers)
    return [by_text.get(row.tobytes(), overall).most_common(1)[0][0] for row in tokens]


def nearest_answers(pairs: Pairs, training: TrainingAnswers) -> list[str]:
    """Return the answer of the nearest training image with the same text, or of the nearest one of all."""
    keys = [(row.tobytes(), answer) for row, answer in zip(training.tokens, training.answers, strict=True)]
    labels = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    label_answers, label_texts = [answer for _, answer in labels], [text for text, _ in labels]
    candidates = dict[bytes, list[int]]()
    for number, text in enumerate(label_texts):
        candidates.setdefault(text, []).append(number)
    sample_labels = np.array([labels[key] for key in keys], np.int64)
    answers, images = list[str](), sample_images(pairs.images, pairs.second_images)
    # The scores of all images and labels together may be larger than the memory.
    for start in range(0, len(images), 256):
        scores = training.neighbours.scores(images[start : start + 256], sample_labels, len(labels))
        for row, tokens in zip(scores, pairs.tokens[start : start + 256], strict=True):
            numbers = np.array(candidates.get(tokens.tobytes(), range(len(labels))))
            answers.append(label_answers[numbers[row[numbers].argmax()]])
    return answers


def sample_images(images: Sequence[bytes], second_images: Sequence[bytes]) -> list[bytes]:
    """Return one image for each sample: of two, both are side by side at half their width."""
    return [*map(_join, images, second_images)] if len(second_images) else [*images]


def _join(left_image: bytes, right_image: bytes) -> bytes:
    from PIL import Image

    halves = [read_crop(image, SIZE).reshape(SIZE, SIZE // 2, 2, 3).mean(2) for image in (left_image, right_image)]
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(halves, 1).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()
