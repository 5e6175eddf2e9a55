"""Tests of the trend of a run, which is computed from a few lines of its history, against the full history."""

import pytest

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.runs.history import CURVE_LINES, read_trend
from tests.support.specs import tiny_spec


@pytest.fixture
def run(tmp_path):
    return create_run(tiny_spec(tmp_path))


def write(run, groups, validate_every=10):
    """Append the lines of metrics of worker groups to the run's history; each group is a (first step, last step).

    A step takes a second, and the start of a worker group takes ten. Every `validate_every` steps, the line has a
    validation loss.
    """
    current_time = 0.0
    for group, (first_step, last_step) in enumerate(groups, start=1):
        current_time += 10
        for step in range(first_step, last_step + 1):
            current_time += 1
            line = {metrics.STEP: step, metrics.GROUP: group, metrics.TIME: current_time, metrics.LOSS: 5 / step}
            line |= {metrics.TOKENS: 100 * step, metrics.TOKENS_PER_S: 100.0}
            if step % validate_every == 0:
                line[metrics.VAL_LOSS] = 6 / step
            history.append(run, line)


def test_run_without_steps_has_empty_trend(run):
    trend = read_trend(run, 10)
    assert (trend.last_line, trend.validation_line, trend.curve, trend.rate, trend.mean_rate) == (
        None,
        None,
        [],
        None,
        None,
    )


@pytest.mark.parametrize("groups", [[(1, 35)], [(1, 400)], [(1, 120), (101, 300)], [(1, 30), (21, 24)]])
def test_trend_matches_effective_history(run, groups):
    write(run, groups)
    full_history, trend = history.read(run), read_trend(run, 10)
    assert trend.last_line == full_history[-1]
    assert trend.recent_lines == full_history[-len(trend.recent_lines) :]
    assert trend.validation_line == [line for line in full_history if metrics.VAL_LOSS in line][-1]
    assert trend.start_line == next(line for line in full_history if line[metrics.GROUP] == len(groups))
    steps = [line[metrics.STEP] for line in trend.curve]
    assert steps == sorted(set(steps))
    assert len(steps) == len(full_history) if len(full_history) < CURVE_LINES else len(steps) > CURVE_LINES / 2
    assert (steps[0], steps[-1]) == (1, full_history[-1][metrics.STEP])
    assert trend.rate == pytest.approx(100.0)
    assert trend.mean_rate == pytest.approx(100.0)


def test_validation_that_will_be_repeated_does_not_count(run):
    """The run continued from step 30 and has not reached step 50 again, so the validation of step 25 is the newest."""
    write(run, [(1, 50), (31, 45)], validate_every=25)
    assert read_trend(run, 25).validation_line[metrics.STEP] == 25


def test_missing_validation_is_none(run):
    write(run, [(1, 90)], validate_every=1000)
    assert read_trend(run, 1000).validation_line is None


def test_mean_rate_includes_time_between_steps(run):
    write(run, [(1, 20)])
    line = history.last_line(run)
    history.append(run, {**line, metrics.STEP: 21, metrics.TOKENS: 2100, metrics.TIME: line[metrics.TIME] + 21})
    trend = read_trend(run, 10)
    assert trend.rate == pytest.approx(100)
    assert trend.mean_rate == pytest.approx(2000 / 40)
