from mhmoe_ray.data.prepare.held_out import is_validation
from tests.data.texts import documents


def test_the_held_out_share_is_near_the_fraction_and_copies_go_together():
    texts = documents("v", 4000)
    held_out = [is_validation(t, 0.1) for t in texts]
    assert 300 < sum(held_out) < 500
    assert held_out == [is_validation(t, 0.1) for t in texts]
