import pytest

from mhmoe_ray.data.prepare.checks import check_not_empty
from mhmoe_ray.data.prepare.parts import PartCounts, TokenisedPart
from mhmoe_ray.data.prepare.validation import cut_end, is_validation, smallest_fraction, split_of_few_documents
from mhmoe_ray.errors import DataError
from tests.data.texts import make_documents
from tests.support.specs import tiny_spec


def test_is_validation_holds_out_about_the_fraction():
    texts = make_documents("v", 4000)
    assert 300 < sum(is_validation(t, 0.1) for t in texts) < 500


def test_is_validation_keeps_texts_held_out_at_a_larger_fraction():
    """All texts held out at fraction 0.1 are held out at 0.3, too, so another fraction moves few documents."""
    texts = make_documents("v", 1000)
    fewer_texts, more_texts = ({t for t in texts if is_validation(t, share)} for share in (0.1, 0.3))
    assert fewer_texts < more_texts


@pytest.mark.parametrize("count", [2, 3, 50])
def test_smallest_fraction_holds_out_one_document(count):
    texts = make_documents("v", count)
    assert sum(is_validation(text, smallest_fraction(texts)) for text in texts) == 1


def test_split_of_few_documents_holds_out_one_or_cuts_the_sole_one():
    counts = [PartCounts(documents=3, smallest_fraction=0.2), PartCounts(documents=2, smallest_fraction=0.1)]
    assert split_of_few_documents(counts, 0.01, can_cut=True) == (0.1, False)
    assert split_of_few_documents([*counts, PartCounts(held_out_documents=1)], 0.01, can_cut=True) == (0.01, False)
    sole_document = [PartCounts(held_out_documents=1, smallest_fraction=0.005)]
    assert split_of_few_documents(sole_document, 0.01, can_cut=True) == (0.01, True)
    assert split_of_few_documents(sole_document, 0.01, can_cut=False) == (0.01, False)


def test_cut_end_cuts_at_a_line_if_there_is_one():
    assert cut_end("one\ntwo\nthree", 0.3) == ["one\ntwo\n", "three"]
    assert cut_end("a" * 10, 0.01) == ["a" * 9, "a"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (PartCounts(documents=9, tokens=900), "no document is in the held-out share"),
        (PartCounts(documents=9, tokens=900, held_out_documents=1), "held-out share have no tokens; raise data.val"),
        (
            PartCounts(documents=9, tokens=9, held_out_documents=1, held_out_tokens=40),
            "no domain fills a single sample",
        ),
    ],
)
def test_preparation_without_a_sample_is_refused(counts, message):
    with pytest.raises(DataError, match=message):
        check_not_empty(tiny_spec().data, {"web/a": [TokenisedPart(0, 0, "part", counts)]})
