import itertools

import pytest

from mhmoe_ray.bench.timing import interleaved, turns


def test_every_case_runs_once_a_round_in_turning_order_and_the_first_round_is_not_counted():
    order = []
    ticks = itertools.count(step=0.5)
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = interleaved(cases, 4, clock=lambda: next(ticks))
    assert "".join(order) == "abc" + "cba" + "abc" + "cba" + "abc"
    assert {name: timing.seconds for name, timing in found.items()} == {name: [0.5] * 4 for name in "abc"}
    assert found["a"].median == pytest.approx(0.5)


@pytest.mark.parametrize("warm_up", [False, True])
def test_the_first_round_there_is_goes_forwards(warm_up):
    found = list(turns("ab", 2, warm_up))
    forwards, backwards = ["a", "b"], ["b", "a"]
    rounds = (backwards, forwards) if warm_up else (forwards, backwards)
    assert found[-4:] == [(number, case) for number, order in enumerate(rounds) for case in order]
    assert found[:-4] == [(-1, "a"), (-1, "b")] * warm_up
