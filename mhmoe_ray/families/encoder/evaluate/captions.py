"""Scores of captions: BLEU, CIDEr-D, and the share of captions that are exactly right.

BLEU and CIDEr-D count words as `words` splits them, so their values are comparable only with values that use the same
split. CIDEr-D is defined in arXiv 1411.5726, section 4; its document frequencies are counted in the references.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mhmoe_ray.evaluate.score import CaptionScore

MAX_GRAM = 4
"""Largest number of words of an n-gram, for BLEU and for CIDEr-D."""
CIDER_SIGMA = 6.0
"""Standard deviation, in words, of CIDEr-D's Gaussian penalty on the difference in length from the reference."""
# These scripts have no spaces between words, so every letter counts as a word: Thai, Lao, Myanmar, Khmer, Hiragana,
# Katakana, and Chinese characters.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")

NGrams = Mapping[tuple[str, ...], float]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: sequences of letters, digits and combining marks, without punctuation.

    A text without letters and digits, such as an emoji, is split at spaces.
    """
    found_words, follows_word, is_open = list[str](), False, False
    for character in unicodedata.normalize("NFC", text.lower()):
        kind, is_unspaced = unicodedata.category(character)[0], _UNSPACED.match(character) is not None
        if (kind == "M" and follows_word) or (kind in "LN" and is_open and not is_unspaced):
            found_words[-1] += character
        elif kind in "LN":
            found_words.append(character)
        # A mark of an emoji, such as a variation selector, belongs to no word.
        follows_word = kind in "LN" or (kind == "M" and follows_word)
        # A letter of an unspaced script ends its word.
        is_open = follows_word and not is_unspaced
    return found_words or text.split()


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScore:
    """Return the score of one caption for each image, given at least one right caption for each."""
    import sacrebleu

    caption_words = [words(caption) for caption in captions]
    reference_words = [[words(reference) for reference in group] for group in references]
    most_references = max(len(group) for group in references)
    # sacrebleu takes a list of the first references of all captions, then a list of the second ones, and so on. A list
    # has None for a caption with fewer references.
    streams: list[Sequence[Any]] = [
        [" ".join(group[number]) if number < len(group) else None for group in reference_words]
        for number in range(most_references)
    ]
    joined_captions = [" ".join(caption) for caption in caption_words]
    bleu = sacrebleu.corpus_bleu(joined_captions, streams, tokenize="none", force=True)
    exact_count = sum(caption in group for caption, group in zip(caption_words, reference_words, strict=True))
    return CaptionScore(
        images=len(captions),
        bleu=bleu.score,
        cider=cider_d(caption_words, reference_words),
        exact=exact_count / len(captions),
    )


def cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Return CIDEr-D, from 0 to 10, of the words of one caption for each image; 10 means equality."""
    document_counts = Counter[tuple[str, ...]]()
    for group in references:
        document_counts.update({gram for reference in group for gram in _count_grams(reference)})
    log_images = math.log(len(references))

    def weights(text: Sequence[str]) -> Sequence[NGrams]:
        grams_by_length: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_GRAM)]
        for gram, count in _count_grams(text).items():
            rarity = log_images - math.log(max(1, document_counts[gram]))
            grams_by_length[len(gram) - 1][gram] = count * rarity
        return grams_by_length

    total = 0.0
    for caption, group in zip(captions, references, strict=True):
        caption_weights = weights(caption)
        for reference in group:
            penalty = math.exp(-((len(caption) - len(reference)) ** 2) / (2 * CIDER_SIGMA**2))
            pairs = zip(caption_weights, weights(reference), strict=True)
            total += penalty * sum(_clipped_cosine(*pair) for pair in pairs) / MAX_GRAM / len(group)
    return 10 * total / len(captions)


def _count_grams(text: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(text[start : start + length])
        for length in range(1, MAX_GRAM + 1)
        for start in range(len(text) - length + 1)
    )


def _clipped_cosine(caption: NGrams, reference: NGrams) -> float:
    """Return the cosine similarity; a caption's weights are clipped to the reference's, so repeats gain nothing."""
    norms = [math.sqrt(sum(weight**2 for weight in grams.values())) for grams in (caption, reference)]
    if not all(norms):
        return 0.0
    product = sum(
        min(weight, reference[gram]) * reference[gram] for gram, weight in caption.items() if gram in reference
    )
    return product / (norms[0] * norms[1])
