from mhmoe_ray.data.prepare.validation import is_validation
from tests.data.texts import make_documents


def test_is_validation_holds_out_about_the_fraction():
    texts = make_documents("v", 4000)
    assert 300 < sum(is_validation(t, 0.1) for t in texts) < 500


def test_is_validation_keeps_texts_held_out_at_a_larger_fraction():
    """The text alone decides, so copies stay together and another fraction moves as few documents as possible."""
    texts = make_documents("v", 1000)
    fewer_texts, more_texts = ({t for t in texts if is_validation(t, share)} for share in (0.1, 0.3))
    assert fewer_texts < more_texts
