"""Tests of the learning-rate schedules of the `train` section."""

import math

import pytest
from pydantic import ValidationError

from mhmoe_ray.spec import TrainSpec


def spec(**fields):
    values = {"steps": 100, "micro_batches": 1, "micro_batch_size": 1, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 10}
    return TrainSpec(**{**values, **fields})


def test_learning_rate_rises_to_its_peak_and_falls_to_its_minimum():
    rates = [spec().learning_rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_learning_rate_equals_that_in_the_first_papers_log():
    """The rate rises to 6e-4 in 375 steps and falls to 0 at step 300,000; the log has 5.72616e-4 at step 14,050."""
    p1 = TrainSpec(steps=300_000, micro_batches=1, micro_batch_size=1, lr=6e-4, min_lr=0, warmup_steps=375)
    assert p1.learning_rate(14_050) == pytest.approx(5.72616e-4, rel=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (50, 5), (3_750, 375), (100_000, 375)])
def test_default_warm_up_is_at_most_a_tenth_of_the_steps(steps, warmup):
    assert TrainSpec(steps=steps, micro_batches=1, micro_batch_size=1).warmup_steps == warmup


def test_a_cosine_meets_the_linear_decay_at_its_ends_and_in_the_middle():
    linear, cosine = spec(), spec(schedule="cosine")
    for step in (5, 10, 55, 100):
        assert cosine.learning_rate(step) == pytest.approx(linear.learning_rate(step))
    assert cosine.learning_rate(30) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 20 / 90)) / 2)


def test_a_constant_schedule_stays_at_its_peak():
    assert [spec(schedule="constant").learning_rate(step) for step in (5, 10, 11, 100, 1000)] == [0.5, 1, 1, 1, 1]


def test_warm_up_stable_decay_stays_at_its_peak_until_the_last_steps():
    schedule = spec(schedule="wsd", decay_steps=20)
    assert [schedule.learning_rate(step) for step in (5, 10, 11, 80)] == [0.5, 1, 1, 1]
    assert schedule.learning_rate(90) == pytest.approx(0.55)
    assert schedule.learning_rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize("fields", [{}, {"schedule": "cosine"}, {"schedule": "wsd", "decay_steps": 20}])
def test_a_longer_run_keeps_the_rates_of_its_first_steps_and_then_the_minimum(fields):
    short, long = spec(**fields), spec(**fields, steps=200, schedule_steps=100)
    assert [long.learning_rate(step) for step in range(1, 101)] == [short.learning_rate(s) for s in range(1, 101)]
    assert {round(long.learning_rate(step), 12) for step in range(101, 201)} == {0.1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "wsd"}, "schedule wsd needs decay_steps"),
        ({"decay_steps": 5}, "decay_steps would be ignored"),
        ({"schedule": "wsd", "decay_steps": 95}, "are more than 100 steps together"),
        ({"schedule": "constant", "schedule_steps": 50}, "schedule_steps would be ignored"),
    ],
)
def test_settings_without_effect_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        spec(**fields)
