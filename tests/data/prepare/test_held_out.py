import pytest

from mhmoe_ray.data.prepare.checks import check_not_empty
from mhmoe_ray.data.prepare.parts import PartCounts, TokenisedPart
from mhmoe_ray.data.prepare.validation import is_validation
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
