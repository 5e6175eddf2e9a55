from mhmoe_ray.data.prepare.validation import is_validation
from tests.data.texts import documents


def test_the_held_out_share_is_near_the_fraction():
    texts = documents("v", 4000)
    assert 300 < sum(is_validation(t, 0.1) for t in texts) < 500


def test_what_is_held_out_stays_so_when_more_is():
    """The text alone decides, so that copies stay together and another fraction moves as few documents as possible."""
    texts = documents("v", 1000)
    some, more = ({t for t in texts if is_validation(t, share)} for share in (0.1, 0.3))
    assert some < more
