"""Normalization of the text of an answer, and the accuracy of an answer, by VQAv2's rules (arXiv 1505.00468).

Punctuation is removed, words become lower case, numbers up to ten become digits, articles are left out, and
contractions get their apostrophes. The rules are those of the official script, with its peculiarities.
"""

import re
from collections import Counter
from collections.abc import Sequence

ANNOTATORS = 10
"""Number of answers to each question."""
_FULL_MATCHES = 3
"""Number of equal answers of other annotators from which an answer is completely right."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_LARGEST_PERIODS = 32
"""Number of periods that are removed: the official script passes a flag in place of this number."""
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_WORDS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
_CONTRACTIONS = {
    word[:position] + word[position + 1 :]: word
    for word in _WORDS.split()
    for position, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""Words by their forms without one of the apostrophes; the last entry is an error of the official script."""


def normalized_answer(text: str) -> str:
    """Return the text of an answer in the form in which answers are compared."""
    text = stripped_answer(text)
    joins_words = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joins_words or is_beside_space else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", result, _LARGEST_PERIODS).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def stripped_answer(text: str) -> str:
    """Return an answer without line breaks and tabs, and without white space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def most_frequent_answer(answers: Sequence[str]) -> str:
    """Return the most frequent of the annotators' answers, normalized; the first in the alphabet among equal ones."""
    counts = Counter(map(normalized_answer, answers))
    return min(counts, key=lambda answer: (-counts[answer], answer))


def answer_accuracy(answer: str, annotated_answers: Sequence[str]) -> float:
    """Return the official accuracy of an answer, from 0 to 1: the mean over each annotator's left out.

    The official script normalizes the answers only if the annotators' differ.
    """
    references = [*map(stripped_answer, annotated_answers)]
    if len(set(references)) > 1:
        answer, references = normalized_answer(answer), [*map(normalized_answer, references)]
    else:
        answer = stripped_answer(answer)
    matches = references.count(answer)
    scores = (min(1.0, (matches - (reference == answer)) / _FULL_MATCHES) for reference in references)
    return sum(scores) / len(references)
