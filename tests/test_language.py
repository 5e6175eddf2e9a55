"""Tests that the check of the code's language (tests/language.py) finds what breaks its rules, and nothing else."""

import pytest

from tests.language import (
    docstring_budget,
    is_fragment,
    is_good_subject,
    is_vague,
    problems_of_budget,
    problems_of_file,
)

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


def test_sections_are_for_interfaces():
    source = MODULE.replace("tokens, block_ids: old names of parameters.", "found: blocks.")
    in_class = source.replace("def match_prefix(", "class Pool(ABC):\n  def match_prefix(").replace(
        "\n    ", "\n      "
    )

    def section_problems(path, text):
        return [problem for problem in problems_of_file(path, text) if "no interface" in problem]

    expected_problem = "kernels/a.py:3: match_prefix is no interface, so its docstring has no sections"
    assert section_problems("kernels/a.py", source) == [expected_problem]
    assert section_problems("mhmoe_ray/api/a.py", source) == []
    assert section_problems("kernels/a.py", in_class) == []


def test_test_files_import_nothing_from_each_other():
    source = "from tests.model.test_moe import make_layer\nfrom tests.support.specs import tiny_spec\n"
    [problem] = problems_of_file("tests/a.py", source)
    assert problem.startswith("tests/a.py:1: it imports from tests.model.test_moe")


def test_budget_counts_docstrings_and_lines_of_code():
    source = '"""One two three."""\n\n# comment\nx = 1\n"""Four\nfive."""\ny = "six"\n'
    assert docstring_budget({"a.py": source}) == (3 / 7, 5 / 2)
    assert list(problems_of_budget({"a.py": source})) == ["docstrings are 42.9% of the lines, and 19% is the limit"]
    assert list(problems_of_budget({"a.py": "x = 1\n" * 9 + source})) == []
