"""Retrieval: for each image its captions are searched among all captions, and for each caption its images.

Images that are equal byte for byte are one image with several captions, and equal captions are one caption with several
images. If several captions belong to an image, the one with the best rank counts; likewise for images of a caption.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.evaluate.score import LanguageRetrieval, Recall, RetrievalFigures, RetrievalScore
from mhmoe_ray.families.images.nearest import NearestImages, distinct_images

RECALL_RANKS = (1, 5, 10)
Scorer = Callable[["Candidates"], np.ndarray]
"""Function that takes `Candidates` and returns the similarity of each of I images with each of C captions, (I, C)."""


class Candidates(NamedTuple):
    """Distinct images and distinct captions of pairs, and the mask of those that match."""

    images: list[bytes]
    captions: np.ndarray
    """Tokens of the distinct captions as the data stores them, with padding, (C, T)."""
    fits: np.ndarray
    """Mask of the captions that belong to each image, (I, C) bool."""

    @staticmethod
    def of_pairs(images: list[bytes], tokens: np.ndarray) -> "Candidates":
        """Return the candidates of pairs, given the image file and the stored tokens, (pairs, T), of each pair."""
        different_images, image_of = distinct_images(images)
        captions, caption_of = np.unique(tokens, axis=0, return_inverse=True)
        fits = np.zeros((len(different_images), len(captions)), np.bool_)
        fits[image_of, caption_of.ravel()] = True
        return Candidates(different_images, captions, fits)


def recall(scores: np.ndarray, fits: np.ndarray) -> Recall:
    """Return the shares of queries for which a right candidate is among the first 1, 5 and 10 by score.

    Both arrays are (queries, candidates); each query has at least one right candidate.
    """
    best_Q1 = np.where(fits, scores, -np.inf).max(1, keepdims=True)
    # An equal score is no evidence for the right candidate, so wrong candidates with the same score come before it. A
    # score that is not a number is below none, so that a model that has diverged finds nothing.
    ranks = 1 + (~(scores < best_Q1) & ~fits).sum(1)
    shares = {rank: float(np.mean(ranks <= rank)) for rank in RECALL_RANKS}
    return Recall(at_1=shares[1], at_5=shares[5], at_10=shares[10])


def score_retrieval(candidates: Candidates, scorer: Scorer) -> RetrievalScore:
    """Return the recall of captions for given images, and of images for given captions."""
    scores = scorer(candidates)
    return RetrievalScore(
        images=len(candidates.images),
        captions=len(candidates.captions),
        image_to_text=recall(scores, candidates.fits),
        text_to_image=recall(scores.T, candidates.fits.T),
    )


def retrieval_figures(
    images: Sequence[bytes],
    tokens: np.ndarray,
    languages: Sequence[str | None],
    scorer: Scorer,
    nearest_scorer: Scorer | None,
) -> RetrievalFigures:
    """Return the scores of retrieval among all pairs, and among those of each language if there are several.

    `tokens` are the stored captions, (pairs, T).
    """

    def score(numbers: Sequence[int]) -> LanguageRetrieval:
        candidates = Candidates.of_pairs([images[number] for number in numbers], tokens[numbers])
        baseline = score_retrieval(candidates, nearest_scorer) if nearest_scorer else None
        return LanguageRetrieval(model=score_retrieval(candidates, scorer), baseline=baseline)

    total = score(range(len(images)))
    names = sorted({language for language in languages if language is not None})
    by_language = {
        name: score([number for number, language in enumerate(languages) if language == name])
        for name in names
        if len(names) > 1
    }
    return RetrievalFigures(**dict(total), languages=by_language)


def nearest_scores(candidates: Candidates, neighbours: NearestImages, training_tokens: np.ndarray) -> np.ndarray:
    """Return the baseline's similarity of each image with each caption, (I, C).

    It is that of the nearest training image, in pixels, that has this caption. `training_tokens` are the stored
    captions of the training samples, (samples, T).
    """
    numbers = {caption.tobytes(): number for number, caption in enumerate(candidates.captions)}
    labels = np.array([numbers.get(row.tobytes(), -1) for row in training_tokens], np.int64)
    return neighbours.scores(candidates.images, labels, len(candidates.captions))
