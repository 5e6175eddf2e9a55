"""Event files of a run, as TensorBoard itself reads them."""

import warnings

import pytest

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import ObjectPath
from mhmoe_ray.train.telemetry.tensorboard import TensorBoard


def line(step, loss):
    return {metrics.STEP: step, metrics.TIME: 1000.0 + step, metrics.LOSS: loss, metrics.LR: 0.25, metrics.GROUP: 1}


def approx(points):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


def read(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_a_restart_repeats_takes_the_place_of_what_it_was(tmp_path):
    run = RunDir(tmp_path)
    board = TensorBoard(run, group=1, start=0)
    for step in range(1, 6):
        board.tell(line(step, 8.0 / step))
    board.tell({**line(6, 1.0), metrics.VAL_LOSS: 2.5, metrics.GRAD_NORM: None})
    board.flush()
    found = read(run.tensorboard)
    assert found["loss/training"] == approx([(s, 8.0 / s) for s in range(1, 6)] + [(6, 1.0)])
    assert found["loss/validation"] == [(6, 2.5)]
    assert "optimizer/gradient_norm" not in found
    board.close()
    again = TensorBoard(run, group=2, start=4)
    again.tell(line(5, 16.0))
    again.close()
    found = read(run.tensorboard)
    assert found["loss/training"] == approx([(s, 8.0 / s) for s in range(1, 5)] + [(5, 16.0)])
    assert found["loss/validation"] == []


def test_on_an_object_store_each_stretch_is_a_file_that_does_not_grow(tmp_path, s3):
    query, _ = s3
    run = RunDir(ObjectPath(f"s3://bucket/{tmp_path.name}?{query}"))
    board = TensorBoard(run, group=1, start=0)
    seen = []
    for step in range(1, 7):
        board.tell(line(step, float(step)))
        if step % 2 == 0:
            board.flush()
            seen.append({p.name: p.stat().st_size for p in run.tensorboard.iterdir()})
    board.close()
    assert [len(files) for files in seen] == [1, 2, 3]
    assert seen[0].items() <= seen[1].items() <= seen[2].items()
    here = tmp_path / "here"
    here.mkdir()
    for file in run.tensorboard.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    assert read(here)["loss/training"] == [(s, float(s)) for s in range(1, 7)]
