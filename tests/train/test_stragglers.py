"""Tests of the detection of stragglers, with made-up times and with those of healthy runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from mhmoe_ray.train.stragglers import RECOVERED_STEPS, SLOW_STEPS, STEPS, find_stragglers, slowdowns
from tests.support.ranks import run_ranks
from tests.support.specs import tiny_spec
from tests.train.jobs import build_trainer, rank_batches

HEALTHY_RUNS = json.loads((Path(__file__).parent / "healthy_times.json").read_text())
"""Own time in seconds of each rank in each step, by run; `python -m tests.train.record_times` writes this file."""


def times(slow_steps, *, ranks=4, factor=2.0, part=0, steps=STEPS):
    """Return times of ranks that need 1 s and wait 0.5 s for data, of which rank 1 is slower in the last steps."""
    time_SR2 = np.tile([1.0, 0.5], (steps, ranks, 1))
    time_SR2[steps - slow_steps :, 1, part] += (factor - 1) * 1.5
    return list(time_SR2)


@pytest.mark.parametrize(
    ("step_times", "known_ranks", "expected"),
    [
        (times(SLOW_STEPS), [], [(1, SLOW_STEPS, 2.0, "compute")]),
        (times(SLOW_STEPS, ranks=2, part=1), [], [(1, SLOW_STEPS, 2.0, "data")]),
        (times(SLOW_STEPS - 1), [], []),
        (times(STEPS, factor=1.39), [], []),
        (times(0), [], []),
        (times(STEPS - 1, steps=STEPS - 1), [], []),  # too few steps
        (times(RECOVERED_STEPS + 1), [1], [(1, RECOVERED_STEPS + 1, 1.0, "compute")]),  # it stays one until it recovers
        (times(RECOVERED_STEPS), [1], []),
    ],
)
def test_a_rank_that_is_slow_in_most_steps_is_a_straggler(step_times, known_ranks, expected):
    assert find_stragglers(step_times, known_ranks) == expected


def test_a_rank_is_compared_with_the_median_of_the_others():
    assert slowdowns(np.array([1.0, 2.0])).tolist() == [0.5, 2.0]
    assert slowdowns(np.array([1.0, 2.0, 2.0, 9.0])).tolist() == [0.5, 1.0, 1.0, 4.5]
    assert slowdowns(np.array([3.0])).tolist() == [1.0]


@pytest.mark.parametrize("run", HEALTHY_RUNS)
def test_healthy_runs_name_nobody_and_a_rank_of_half_speed_is_named_within_50_steps(run):
    own_SR = np.array(HEALTHY_RUNS[run])
    time_SR2 = np.stack([own_SR, 0 * own_SR], axis=2)
    windows = [list(time_SR2[end - STEPS : end]) for end in range(STEPS, len(time_SR2) + 1)]
    assert [find_stragglers(window) for window in windows] == [[]] * len(windows)
    for rank in range(time_SR2.shape[1]):
        slow_SR2 = time_SR2.copy()
        slow_SR2[:, rank, 0] *= 2
        for start in range(0, len(time_SR2) - 50, 50):
            results = [find_stragglers(list(slow_SR2[start : start + count])) for count in range(STEPS, 51)]
            assert [rank] in [[straggler.rank for straggler in stragglers] for stragglers in results]


def own_seconds_with_a_slow_rank(spec):
    """Return this rank's own time in a step in which rank 1 sleeps in its forward."""
    import time

    trainer = build_trainer(spec)
    if trainer.mesh.rank == 1:
        forward = trainer.forward
        trainer.forward = lambda *args: (time.sleep(1), forward(*args))[1]
    return trainer.accumulate(rank_batches(spec, 0, trainer)).own_seconds


@pytest.mark.parametrize("cluster", [{"ep": 1}, {"ep": 2}])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_own_time_of_a_rank_has_no_waits_for_a_slow_rank(cluster, packing):
    """Rank 0 waits for rows or gradients of rank 1, which sleeps for 1 s in each of its micro-batches."""
    spec = tiny_spec(cluster={"workers": 2, **cluster}, data={"packing": packing})
    own_seconds, slow_seconds = run_ranks(2, own_seconds_with_a_slow_rank, spec)
    assert slow_seconds - own_seconds > 0.5 * spec.train.micro_batches / 2
