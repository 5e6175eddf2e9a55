"""Tests of runs whose micro-batches have parts: samples on any number of workers, and the metrics of each part."""

import pytest

from mhmoe_ray.runs import history, metrics
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.data.texts import make_documents, write_documents
from tests.support.watch import newest_run

# Two files have quicker tests: tests/data/order/test_parts.py of the order of parts, and test_encoder_runs.py of their
# losses.
pytestmark = pytest.mark.slow
PARTS = {"first": {"sources": ["a"], "micro_batch_size": 1}, "others": {"sources": ["b", "c"], "micro_batch_size": 3}}


@pytest.fixture(scope="module")
def project(tmp_path_factory, local_cluster):
    folder = tmp_path_factory.mktemp("parts")
    for name in "abc":
        write_documents(folder / name / "one.jsonl", make_documents(name, 30))
    return folder


def train(project, workers):
    """Train a run with some number of workers, and return its metrics of each step and its status."""
    write_spec(
        project,
        data={
            "sources": {name: {"path": name} for name in "abc"},
            "parts": PARTS,
            "prepared": "prepared",
        },
        train={"steps": 6, "micro_batch_size": 4, "validate_every": 3, "checkpoint_every": 6},
        cluster={"workers": workers, "ep": workers},
    )
    result = mhmoe(project, "submit", "spec.yaml")
    assert result.code == 0, result.err
    run = newest_run(project)
    return history.read(run), mhmoe(project, "status", run.id)


@pytest.fixture(scope="module")
def run(project):
    """Return the metrics of each step of a run of two workers, and its status."""
    return train(project, 2)


def test_steps_have_the_same_samples_on_any_number_of_workers(project, run):
    lines, other_lines = run[0], train(project, 1)[0]
    assert len(lines) == 6
    assert [line[metrics.STREAM] for line in other_lines] == [line[metrics.STREAM] for line in lines]
    expected = lines[-1][metrics.VAL_PART_LOSS]
    assert other_lines[-1][metrics.VAL_PART_LOSS] == pytest.approx(expected, rel=1e-3)


def test_the_losses_of_parts_add_up_to_the_loss(run):
    """All samples have equally many targets, so the parts count by their numbers of samples."""
    for line in run[0]:
        first_loss, other_loss = (line[metrics.PART_LOSS][name] for name in PARTS)
        assert (first_loss + 3 * other_loss) / 4 == pytest.approx(line[metrics.LOSS], rel=1e-5)


def test_validation_and_status_have_the_losses_of_parts(run):
    lines, status = run
    validated_lines = [line for line in lines if metrics.VAL_LOSS in line]
    assert [line[metrics.STEP] for line in validated_lines] == [3, 6]
    part_losses = validated_lines[-1][metrics.VAL_PART_LOSS]
    assert list(part_losses) == list(PARTS)
    assert min(part_losses.values()) <= validated_lines[-1][metrics.VAL_LOSS] <= max(part_losses.values())
    assert f"first {lines[-1][metrics.PART_LOSS]['first']:.4f} (validation {part_losses['first']:.4f})" in status.out
