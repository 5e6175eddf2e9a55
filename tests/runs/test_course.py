"""The course of a run, read from a few places of its history, against its whole history."""

import pytest

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.runs.history import CURVE, course
from tests.specs import tiny_spec


@pytest.fixture
def run(tmp_path):
    return create_run(tiny_spec(tmp_path))


def write(run, groups, validate_every=10):
    """Write the metrics lines of starts of workers, each given as (first, last) step.

    A step takes a second, and a start takes ten.
    """
    now = 0.0
    for group, (first, last) in enumerate(groups, start=1):
        now += 10
        for step in range(first, last + 1):
            now += 1
            line = {metrics.STEP: step, metrics.GROUP: group, metrics.TIME: now, metrics.LOSS: 5 / step}
            line |= {metrics.TOKENS: 100 * step, metrics.TOKENS_PER_S: 100.0}
            if step % validate_every == 0:
                line[metrics.VAL_LOSS] = 6 / step
            history.append(run, line)


def test_a_run_without_steps_has_no_course(run):
    found = course(run, 10)
    assert (found.last, found.validation, found.curve, found.rate, found.mean_rate) == (None, None, [], None, None)


@pytest.mark.parametrize("groups", [[(1, 35)], [(1, 400)], [(1, 120), (101, 300)], [(1, 30), (21, 24)]])
def test_it_is_that_of_the_effective_history(run, groups):
    write(run, groups)
    whole, found = history.read(run), course(run, 10)
    assert found.last == whole[-1]
    assert found.recent == whole[-len(found.recent) :]
    assert found.validation == [line for line in whole if metrics.VAL_LOSS in line][-1]
    assert found.start == next(line for line in whole if line[metrics.GROUP] == len(groups))
    steps = [line[metrics.STEP] for line in found.curve]
    assert steps == sorted(set(steps))
    assert len(steps) == len(whole) if len(whole) < CURVE else len(steps) > CURVE / 2
    assert (steps[0], steps[-1]) == (1, whole[-1][metrics.STEP])
    assert found.rate == pytest.approx(100.0)
    assert found.mean_rate == pytest.approx(100.0)


def test_a_validation_that_a_restart_will_repeat_does_not_count(run):
    write(run, [(1, 50), (31, 45)], validate_every=25)
    assert course(run, 25).validation[metrics.STEP] == 25


def test_without_a_validation_within_its_interval_there_is_none(run):
    write(run, [(1, 90)], validate_every=1000)
    assert course(run, 1000).validation is None


def test_the_clock_counts_what_steps_do_not(run):
    write(run, [(1, 20)])
    line = history.last(run)
    history.append(run, {**line, metrics.STEP: 21, metrics.TOKENS: 2100, metrics.TIME: line[metrics.TIME] + 21})
    found = course(run, 10)
    assert found.rate == pytest.approx(100)
    assert found.mean_rate == pytest.approx(2000 / 40)
