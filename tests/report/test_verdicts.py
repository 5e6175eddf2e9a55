"""Tests of verdicts over seeds: corrected tests, power, and what each verdict says."""

import pytest

from mhmoe_ray.report.seeds import SeedValues, correct_for_number
from mhmoe_ray.report.variants import Variant
from mhmoe_ray.report.verdicts import compare_variants
from tests.report.runs import MOE, make_run, read_variants

UNIT = [-1.0, 0.0, 1.0]
"""Values with a deviation of 1."""


@pytest.mark.parametrize(
    ("values", "difference", "seeds"),
    [
        # Sample sizes of t-tests with a power of 90% at 5%, in units of the deviation, as statistical tables have them.
        (SeedValues([0.0] * 3, UNIT, paired=True), 0.5, 44),
        (SeedValues([0.0] * 3, UNIT, paired=True), 1.0, 13),
        (SeedValues(UNIT, UNIT, paired=False), 0.5, 86),
        (SeedValues(UNIT, UNIT, paired=False), 1.0, 23),
    ],
)
def test_seeds_for_a_difference_are_those_of_tables(values, difference, seeds):
    assert values.seeds_for(difference) == seeds
    assert values.power(difference, seeds - 1) < 0.9 <= values.power(difference, seeds)


def test_the_smallest_difference_is_found_with_these_seeds():
    values = SeedValues([0.0] * 6, [*UNIT, *UNIT], paired=True)
    difference = values.smallest_difference()
    assert values.power(difference, 6) == pytest.approx(0.9)
    assert values.seeds_for(difference * 1.001) == 6
    assert SeedValues([0.0] * 3, UNIT, paired=True).seeds_for(1e-4) is None


def test_p_values_are_corrected_by_holms_method():
    assert correct_for_number([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_for_number([]) == []


def variant_of(tmp_path, name, losses, experts):
    runs = [make_run(tmp_path, name, seed, loss, moe={**MOE, "experts": experts}) for seed, loss in enumerate(losses)]
    [variant] = read_variants(runs)
    return Variant(name, variant.runs)


def test_verdicts_say_better_worse_equal_or_undecided(tmp_path):
    losses = {
        "base": (3.00, 3.10, 3.05),
        "better": (2.90, 3.01, 2.95),
        "worse": (3.10, 3.21, 3.14),
        "equal": (3.001, 3.1, 3.05),
        "undecided": (2.98, 3.11, 3.04),
        "without-deviation": (3.00, 3.10, 3.05),
    }
    base, *variants = (variant_of(tmp_path, name, values, 4 * i) for i, (name, values) in enumerate(losses.items(), 1))
    verdicts = compare_variants(base, variants, 20)
    assert [verdict.word for verdict in verdicts] == ["better", "worse", "equal", "undecided", "equal"]
    assert "equal: equal within 0.01" in verdicts[2].text.replace(" to base", "")
    undecided = verdicts[3]
    assert f"{undecided.seeds_for_margin} seeds one of 0.01" in undecided.text
    assert undecided.as_json()["verdict"] == "undecided"
    [single_verdict] = compare_variants(base, variants[:1], 20)
    # Its p-value is the smallest of five.
    assert verdicts[0].p == pytest.approx(5 * single_verdict.p)
    [strict] = compare_variants(base, variants[2:3], 20, margin=1e-4)
    assert strict.margin == 1e-4
    assert strict.word == "undecided"
