"""Tests of the event files of a run, read with TensorBoard itself."""

import pytest

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import ObjectPath
from mhmoe_ray.train.telemetry.tensorboard import TensorBoard
from tests.support.event_files import read_scalars


def line(step, loss):
    """Return the line of metrics of a step with this loss."""
    return {metrics.STEP: step, metrics.TIME: 1000.0 + step, metrics.LOSS: loss, metrics.LR: 0.25, metrics.GROUP: 1}


def approx(points):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


def test_restart_replaces_repeated_steps(tmp_path):
    """Values of the first worker group after the step at which the second one starts are no longer shown."""
    run = RunDir(tmp_path)
    board = TensorBoard(run, group=1, start=0)
    for step in range(1, 6):
        board.report(line(step, 8.0 / step), None)
    board.report({**line(6, 1.0), metrics.VAL_LOSS: 2.5, metrics.GRAD_NORM: None}, None)
    board.flush()
    scalars = read_scalars(run.tensorboard)
    assert scalars["loss/training"] == approx([(s, 8.0 / s) for s in range(1, 6)] + [(6, 1.0)])
    assert scalars["loss/validation"] == [(6, 2.5)]
    assert "optimizer/gradient_norm" not in scalars
    board.close("FINISHED")
    second_board = TensorBoard(run, group=2, start=4)
    second_board.report(line(5, 16.0), None)
    second_board.close("FINISHED")
    scalars = read_scalars(run.tensorboard)
    assert scalars["loss/training"] == approx([(s, 8.0 / s) for s in range(1, 5)] + [(5, 16.0)])
    assert scalars["loss/validation"] == []


def test_object_store_gets_one_file_per_flush(tmp_path, s3):
    query, _ = s3
    run = RunDir(ObjectPath(f"s3://bucket/{tmp_path.name}?{query}"))
    board = TensorBoard(run, group=1, start=0)
    file_sizes = []
    for step in range(1, 7):
        board.report(line(step, float(step)), None)
        if step % 2 == 0:
            board.flush()
            file_sizes.append({p.name: p.stat().st_size for p in run.tensorboard.iterdir()})
    board.close("FINISHED")
    assert [len(files) for files in file_sizes] == [1, 2, 3]
    assert file_sizes[0].items() <= file_sizes[1].items() <= file_sizes[2].items()
    local_folder = tmp_path / "here"
    local_folder.mkdir()
    for file in run.tensorboard.iterdir():
        (local_folder / file.name).write_bytes(file.read_bytes())
    assert read_scalars(local_folder)["loss/training"] == [(s, float(s)) for s in range(1, 7)]
