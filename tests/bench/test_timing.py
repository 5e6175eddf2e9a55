import itertools

import pytest

from mhmoe_ray.bench.timing import measure_rounds, time_interleaved


def test_rounds_alternate_order_and_warm_up_is_not_counted():
    order = []
    ticks = itertools.count(step=0.5)
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = time_interleaved(cases, 4, clock=lambda: next(ticks))
    assert "".join(order) == "abc" + "cba" + "abc" + "cba" + "abc"
    assert {name: timing.seconds for name, timing in timings.items()} == {name: [0.5] * 4 for name in "abc"}
    assert timings["a"].median == pytest.approx(0.5)


@pytest.mark.parametrize("warm_up", [False, True])
def test_first_round_is_in_given_order(warm_up):
    calls = []
    results = measure_rounds("ab", 2, lambda case, number: calls.append((number, case)) or len(calls), warm_up)
    forward_order, reverse_order = ["a", "b"], ["b", "a"]
    rounds = (reverse_order, forward_order) if warm_up else (forward_order, reverse_order)
    assert calls[-4:] == [(number, case) for number, order in enumerate(rounds) for case in order]
    assert calls[:-4] == [(-1, "a"), (-1, "b")] * warm_up
    # Results of a warm-up are dropped.
    cases_of_results = {case: [calls[i - 1][1] for i in values] for case, values in results.items()}
    assert cases_of_results == {"a": ["a", "a"], "b": ["b", "b"]}
