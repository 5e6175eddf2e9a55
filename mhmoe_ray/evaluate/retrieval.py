"""Retrieval: the captions that fit an image are found among all captions, and the images that fit a caption.

Images that are equal byte for byte are one image with several captions, and equal captions are one caption with several
images. An image or a caption is found at the rank of the best of those that fit it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mhmoe_ray.evaluate.nearest import NearestImages, distinct_images
from mhmoe_ray.evaluate.score import LanguageRetrieval, Recall, RetrievalFigures, RetrievalScore

RECALL_RANKS = (1, 5, 10)
Scorer = Callable[["Candidates"], np.ndarray]
"""Function (candidates) -> similarity of each image and each caption, (I, C)."""


class Candidates(NamedTuple):
    """Different images and captions of some pairs, and which of them belong together."""

    images: list[bytes]
    captions: np.ndarray
    """Stored tokens of the different captions, (C, T)."""
    fits: np.ndarray
    """Mask of the captions that belong to each image, (I, C) bool."""

    @staticmethod
    def of_pairs(images: list[bytes], tokens: np.ndarray) -> "Candidates":
        """Return the candidates in pairs: images, and the tokens (pairs, T) of their captions."""
        different_images, image_of = distinct_images(images)
        captions, caption_of = np.unique(tokens, axis=0, return_inverse=True)
        fits = np.zeros((len(different_images), len(captions)), np.bool_)
        fits[image_of, caption_of.ravel()] = True
        return Candidates(different_images, captions, fits)


def recall(scores: np.ndarray, fits: np.ndarray) -> Recall:
    """Return the share of queries whose best fitting candidate is among the first ones.

    Args:
        scores: score of each candidate for each query, (queries, candidates).
        fits: mask of the candidates that fit a query; at least one of each row.
    """
    best_Q1 = np.where(fits, scores, -np.inf).max(1, keepdims=True)
    # Equal scores are no evidence for the right candidate, so wrong ones with the same score come before it.
    ranks = 1 + ((scores >= best_Q1) & ~fits).sum(1)
    shares = {rank: float(np.mean(ranks <= rank)) for rank in RECALL_RANKS}
    return Recall(at_1=shares[1], at_5=shares[5], at_10=shares[10])


def score_retrieval(candidates: Candidates, scorer: Scorer) -> RetrievalScore:
    """Return the score of both directions."""
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
    """Return the retrieval among all pairs, and among those of each language if there are several.

    Args:
        images: image file of each pair.
        tokens: stored tokens of each caption, (pairs, T).
        languages: language of each caption, None where it is not named.
        scorer: similarities by the model.
        nearest_scorer: similarities by the baseline; None leaves it out.
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
    """Return the similarities, (I, C), of the baseline: a caption is as near as the nearest training image with it.

    Args:
        candidates: the images and captions.
        neighbours: the images of the training.
        training_tokens: stored tokens of the caption of each of them, (samples, T).
    """
    numbers = {caption.tobytes(): number for number, caption in enumerate(candidates.captions)}
    labels = np.array([numbers.get(row.tobytes(), -1) for row in training_tokens], np.int64)
    return neighbours.scores(candidates.images, labels, len(candidates.captions))
