"""Tests of the accuracies, precisions and recalls that a report shows."""

import math

import pytest

from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, save_evaluation
from mhmoe_ray.evaluate.score import AccuracyFigures, ObjectFigures, ObjectPrecision, VisionFigures
from mhmoe_ray.report.comparison import compare_runs
from mhmoe_ray.report.page import render_page
from mhmoe_ray.report.quality import quality_tables
from tests.report.runs import read_variants, six_runs

pytestmark = pytest.mark.long


def store_vision_evaluation(run, top_1, box_ap50, *, masks=True, samples=500, checkpoint="step_00000020.1"):
    """Store an evaluation of a run's vision model with this top-1 accuracy and this box AP50."""
    fields = {"prepared": None, "text": None, "samples": samples, "tasks": [], "task_folders": [], "limit": None}
    request = EvalRequest(run=str(run.path), checkpoint=checkpoint, batch=8, half=False, cpus=1, gpus=0, **fields)
    accuracy = AccuracyFigures(images=9, classes=3, top_1=top_1, top_5=0.9, baseline=None, largest_class=None)
    precision = ObjectPrecision(
        box_ap=0.1,
        box_ap50=box_ap50,
        box_ap75=0.1,
        mask_ap=0.1 if masks else None,
        mask_ap50=0.2 if masks else None,
        any_class_box_ap50=0.6,
    )
    figures = VisionFigures(
        losses={}, classes={"name": accuracy}, objects={"find": ObjectFigures(images=9, objects=9, precision=precision)}
    )
    save_evaluation(run, Evaluation(request=request, step=20, tokens=2560, seconds=1.0, vision=figures))


def test_figures_of_evaluations_have_intervals_over_seeds(tmp_path):
    runs = six_runs(tmp_path)
    for run, top_1, ap50 in zip(runs, (0.5, 0.6, 0.7, 0.55, 0.67, 0.77), (0.1, 0.1, 0.1, 0.2, 0.3, 0.4), strict=True):
        store_vision_evaluation(run, top_1, ap50)
    dense, mhmoe = read_variants(runs)
    [table] = quality_tables([dense, mhmoe], dense)
    rows = {(row.figure, row.variant): row for row in table.rows}
    assert [name for name, _ in rows][::2] == [
        *("name, top 1", "name, top 5"),
        *("find, box AP", "find, box AP50", "find, mask AP", "find, mask AP50", "find, box AP50 whatever the class"),
    ]
    base_row, other_row = rows["name, top 1", "dense"], rows["name, top 1", "mhmoe-h2"]
    assert (base_row.mean, base_row.deviation, base_row.difference) == (pytest.approx(0.6), pytest.approx(0.1), None)
    # The differences 0.05, 0.07 and 0.07 have a standard deviation of 0.011547. The 97.5 per cent quantile of Student's
    # t with 2 degrees of freedom is 4.302653.
    half_width = 4.302653 * 0.011547 / math.sqrt(3)
    expected = (0.19 / 3, 0.19 / 3 - half_width, 0.19 / 3 + half_width)
    assert (other_row.difference, other_row.low, other_row.high) == pytest.approx(expected, abs=1e-5)
    comparison = compare_runs(runs)
    assert comparison.quality == [table]
    page = render_page(comparison, {})
    assert "<td>find, box AP50</td>" in page
    assert '<td data-label="to dense">+0.2000</td>' in page
    assert "Without an evaluation" not in page


def test_an_evaluation_that_a_run_lacks_is_left_out_and_the_run_is_named(tmp_path):
    runs = six_runs(tmp_path)
    for run in runs[:-1]:
        store_vision_evaluation(run, 0.5, 0.1)
    store_vision_evaluation(runs[0], 0.5, 0.1, samples=7)
    comparison = compare_runs(runs)
    assert comparison.quality == []
    assert f"Without an evaluation that others have: {runs[-1].id}." in render_page(comparison, {})
    # An evaluation that only this run has does not help.
    store_vision_evaluation(runs[-1], 0.5, 0.1, samples=9)
    comparison = compare_runs(runs)
    assert comparison.quality == []
    assert f"Without an evaluation that others have: {runs[-1].id}." in render_page(comparison, {})
    store_vision_evaluation(runs[-1], 0.5, 0.1, masks=False)
    [table] = compare_runs(runs).quality
    assert {row.variant: row.deviation for row in table.rows if row.figure == "find, mask AP"} == {
        "dense": 0,
        "mhmoe-h2": 0,
    }


def test_evaluations_of_restarted_runs_are_compared_with_those_of_others(tmp_path):
    """The name of a checkpoint counts the worker groups of its run, so it differs after a restart."""
    runs = six_runs(tmp_path)
    for number, run in enumerate(runs):
        store_vision_evaluation(run, 0.5, 0.1, checkpoint=f"step_00000020.{1 + number % 2}")
    comparison = compare_runs(runs)
    assert [(table.step, len(table.rows)) for table in comparison.quality] == [(20, 14)]
    assert "Without an evaluation" not in render_page(comparison, {})
