"""Tests that the check of the code's language (tests/language.py) finds what breaks its rules, and nothing else."""

import pytest

from tests.language import is_fragment, is_good_subject, is_vague, problems_of_file

MODULE = '''"""Block pool."""

def match_prefix(token_ids, found):
    """Of the blocks, those that match.

    Args:
        token_ids: ids of the prompt.
        tokens, block_ids: old names of parameters.
    """
    first_block = next((why for why in token_ids), None)
    return first_block
'''


def test_problems_of_a_file_name_line_and_rule():
    assert [problem.partition(": ")[0::2] for problem in problems_of_file("a.py", MODULE)] == [
        ("a.py:4", "the docstring is a fragment: Of the blocks, those that match."),
        ("a.py:3", "the docstring describes a parameter that does not exist: tokens"),
        ("a.py:3", "the docstring describes a parameter that does not exist: block_ids"),
        ("a.py:3", "the name has no noun: found"),
        ("a.py:10", "the name has no noun: why"),
    ]


@pytest.mark.parametrize("name", ["found", "_made", "why_not", "WHERE", "OnceMore", "of_all"])
def test_name_without_a_noun_is_vague(name):
    assert is_vague(name)


@pytest.mark.parametrize("name", ["matching_blocks", "failure_reason", "first_line", "i", "x_ND", "__all__"])
def test_name_with_a_noun_is_not_vague(name):
    assert not is_vague(name)


def test_fragment_starts_in_the_middle_of_a_sentence():
    assert all(map(is_fragment, ["Of the rows.", "That workers wait.", "Nothing is left.", "Whether it runs."]))
    assert not any(map(is_fragment, ["Return the rows.", "`x` is a row.", "Blocks of the KV cache.", "Outcome."]))


@pytest.mark.parametrize(
    ("subject", "is_good"),
    [
        ("serve: cache the logits", True),
        ("cluster, bench, report: rewrite docstrings plainly", True),
        ("Cache the logits", False),
        ("serve: cache the logits.", False),
        ("serve: " + "x" * 66, False),
    ],
)
def test_subject_has_an_area_and_at_most_72_characters(subject, is_good):
    assert is_good_subject(subject) == is_good
