"""Tests of `mhmoe resume --check`: it repeats the last steps of a run, finds flipped bits, and changes nothing."""

import json
import shutil
import signal
import subprocess

import numpy as np
import pytest

import mhmoe_ray as mh
from mhmoe_ray.checkpoint.manifest import committed_checkpoints, is_committed, stored_manifest
from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.manifest import data_digest, require_data_manifest
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.errors import CheckpointError, RunError
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir, create_run, last_attempt
from mhmoe_ray.spec import load_resolved_spec
from mhmoe_ray.storage import describe_file, write_json
from mhmoe_ray.train.repetition import GPU_TOLERANCE, RepeatedStep, ResumeCheck, find_repetition, is_close
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, command, mhmoe
from tests.data.texts import write_corpus
from tests.support.saved import write_checkpoint
from tests.support.specs import tiny_spec
from tests.support.watch import end_by_ctrl_c, newest_run, wait_until

STEPS, STEPS_PER_CHECKPOINT = 8, 2


@pytest.fixture(scope="module")
def project(tmp_path_factory, local_cluster):
    folder = tmp_path_factory.mktemp("repetition")
    write_corpus(folder / "raw")
    return folder


def train(project, **cluster):
    """Train a run of 8 steps with a checkpoint after every second one, and return it."""
    section = {"steps": STEPS, "checkpoint_every": STEPS_PER_CHECKPOINT, "validate_every": 3}
    write_spec(project, train=section, cluster=cluster)
    result = mhmoe(project, "submit", "spec.yaml")
    assert result.code == 0, result.err
    run = newest_run(project)
    # The job copies the last lines of its log into the run when it ends.
    wait_until(lambda: not jobs.is_alive(connect(), last_attempt(run).job), "the end of the job")
    return run


@pytest.fixture(scope="module")
def finished(project):
    return train(project)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.ray
def test_a_healthy_run_is_equal_and_stays_as_it_is(project, finished):
    old_contents = contents(project)
    result = mhmoe(project, "resume", "--check")
    assert result.code == 0, result.err
    *rows, verdict = result.out.splitlines()
    assert verdict == "2 steps from step_00000006.1 on and step_00000008.1 are equal to the last bit"
    losses = [str(line[metrics.LOSS]) for line in history.read(finished)[-2:]]
    assert [row.split() for row in rows[1:]] == [["7", losses[0], losses[0], "yes"], ["8", losses[1], losses[1], "yes"]]
    assert contents(project) == old_contents


def flip_value(checkpoint, part):
    """Flip a bit of the largest value in the first file of a part, and write the new hash into the manifest."""
    file = min((checkpoint / part).iterdir())
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 4 * int(np.abs(np.frombuffer(data, "<f4", offset=start)).argmax()) + 2] ^= 1
    file.write_bytes(data)
    manifest = stored_manifest(checkpoint)
    manifest.files[f"{part}/{file.name}"] = describe_file(file)
    write_json(checkpoint / "manifest.json", manifest.model_dump(mode="json"))


def flip_start_weights(run):
    flip_value(committed_checkpoints(run)[-2], "weights")


def flip_start_moments(run):
    flip_value(committed_checkpoints(run)[-2], "optim")


def flip_end_weights(run):
    flip_value(committed_checkpoints(run)[-1], "weights")


def flip_order(run):
    spec = load_resolved_spec(run.spec_file)
    run.write_spec(spec.model_copy(update={"seed": spec.seed ^ 1}))


def flip_token(run):
    """Flip a bit of a token that the last step reads, in a copy of the data, and write all hashes anew."""
    spec = load_resolved_spec(run.spec_file)
    copy = run.path.parent / "prepared"
    shutil.copytree(spec.data.prepared, copy)
    manifest = require_data_manifest(copy)
    domain, row = TrainingSamples(spec).locate_sample(STEPS * spec.samples_per_step - 1)
    for shard in manifest.domains[domain].shards:
        if row < shard.rows:
            break
        row -= shard.rows
    [first_row] = ShardReader(copy, [shard], manifest.token_bytes, None).read(np.array([0]))
    data = bytearray((copy / shard.file).read_bytes())
    offset = data.find(first_row.tobytes()) + row * first_row.nbytes
    data[offset + 2 * manifest.token_bytes] ^= 1
    (copy / shard.file).write_bytes(data)
    tree = json.loads((copy / "manifest.json").read_text())
    text = json.dumps(tree).replace(shard.sha256, describe_file(copy / shard.file).sha256)
    (copy / "manifest.json").write_text(text)
    run.write_spec(spec.model_copy(update={"data": spec.data.model_copy(update={"prepared": copy})}))
    for checkpoint in committed_checkpoints(run):
        changed = stored_manifest(checkpoint).model_copy(update={"data_sha256": data_digest(copy)})
        write_json(checkpoint / "manifest.json", changed.model_dump(mode="json"))


def damage_file(run):
    file = min((committed_checkpoints(run)[-2] / "optim").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("flip", "code", "message", "different_steps"),
    [
        (flip_start_weights, 8, "2 of 2 repeated steps differ in loss, gradient norm", [7, 8]),
        slow(flip_start_moments, 8, "1 of 2 repeated steps differ in loss, gradient norm", [8]),
        slow(flip_end_weights, 8, "; remove step_00000008.1, and `mhmoe resume` goes on from step_00000006.1", []),
        slow(flip_token, 4, "1 of 2 repeated steps differ in loss, gradient norm, samples", [8]),
        slow(flip_order, 4, "2 of 2 repeated steps differ in loss, gradient norm, samples", [7, 8]),
        slow(damage_file, 8, "does not have the hash it was written with", None),
    ],
)
def test_a_flipped_bit_is_found(project, finished, tmp_path, flip, code, message, different_steps):
    run = RunDir(tmp_path / finished.id)
    shutil.copytree(finished.path, run.path)
    flip(run)
    old_contents = contents(tmp_path)
    result = mhmoe(project, "resume", str(run.path), "--check", "--json")
    assert result.code == code, result
    assert message in result.err.splitlines()[-1]
    if different_steps is not None:
        check = json.loads(result.out)
        assert [step["step"] for step in check["steps"] if step["different"]] == different_steps
        assert check["different_state"]
    assert contents(tmp_path) == old_contents


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_the_repetition_and_removes_its_folder(project, finished):
    old_contents = contents(project)
    checking = subprocess.Popen(
        command("resume", finished.id, "--check"),
        cwd=project,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        folder = wait_until(lambda: next(finished.path.parent.glob(".check-*"), None), "the folder of the repetition")
        wait_until(lambda: next(folder.glob("*/events.jsonl"), None), "its first event")
        end_by_ctrl_c(checking)
    finally:
        checking.kill()
    token = folder.name.rpartition("-")[2]
    assert jobs.info(connect(), f"check-{finished.id}-{token}").status == "STOPPED"
    assert contents(project) == old_contents


STRATEGIES = {
    "ddp": {"workers": 2, "ep": 2},
    "fsdp": {"workers": 2, "ep": 2, "strategy": "fsdp"},
    "fsdp-experts": {"workers": 2, "ep": 1, "strategy": "fsdp", "shard_experts": True},
    "hybrid": {"workers": 4, "ep": 2, "strategy": "fsdp", "shard_group": 2, "shard_experts": True},
    "zero1": {"workers": 2, "ep": 2, "strategy": "zero1"},
    "zero2": {"workers": 2, "ep": 1, "strategy": "zero2"},
    "zero3": {"workers": 2, "ep": 1, "strategy": "zero3"},
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_three_healthy_checkpoints_of_each_strategy_are_equal(project, strategy):
    """All strategies together check 21 checkpoints, a third of them from the run's start."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = train(project, **STRATEGIES[strategy])
    checkpoints = {str(path): path for path in committed_checkpoints(run)}
    for count in (4, 3, 1):
        for path in list(checkpoints.values())[count:]:
            shutil.rmtree(path, ignore_errors=True)
        assert sum(map(is_committed, checkpoints.values())) == count
        check = mh.Run(run).check_resume()
        assert check.is_equal, check
        assert [step.step for step in check.steps] == [STEPS_PER_CHECKPOINT * count - 1, STEPS_PER_CHECKPOINT * count]


def test_a_run_without_two_checkpoints_or_with_other_workers_is_refused(tmp_path):
    run = create_run(tiny_spec(tmp_path))
    with pytest.raises(CheckpointError):
        find_repetition(run)
    write_checkpoint(run, 0)
    with pytest.raises(RunError, match=r"there is no checkpoint before step_00000000\.1 to repeat steps from; train"):
        find_repetition(run)
    for group, step in ((1, 2), (2, 4)):
        write_checkpoint(run, step, group)
        worker = {"rank": 0, "pid": 1, "began": 1.0, "host": "here", "node": "n"}
        events.record(run, "started", group=group, step=step - 2, ep=1, workers=[worker] * group)
    assert find_repetition(run)[1:] == (run.checkpoints / "step_00000002.1", run.checkpoints / "step_00000004.2")
    for step, group in ((3, 1), (4, 2)):
        line = {metrics.STEP: step, metrics.LOSS: 1.0, metrics.GROUP: group, metrics.TOKENS: 1, metrics.TIME: 1.0}
        history.append(run, {**line, metrics.TOKENS_PER_S: 9.0})
    with pytest.raises(RunError, match="steps 3 to 4 were not all trained by equally many workers"):
        find_repetition(run)
    events.record(run, "skipped_checkpoint", name="step_00000002.1", reason="it is damaged")
    with pytest.raises(RunError, match="steps 1 to 4"):
        find_repetition(run)


def test_a_tolerance_is_relative_and_for_numbers_alone():
    assert is_close(4.0, 4.05, GPU_TOLERANCE)
    assert not is_close(4.0, 4.1, GPU_TOLERANCE)
    assert not is_close(4.0, 4.0 + 1e-15, 0.0)
    assert not is_close("ab", "ac", GPU_TOLERANCE)
    step = RepeatedStep(step=7, recorded={"loss": 1.0}, repeated={"loss": 1.5}, different=["loss"])
    check = ResumeCheck(start=None, end="step_00000008.1", steps=[step], different_state=[], tolerance=0.02)
    assert "run a: 1 of 1 repeated steps differ in loss; restore its start" in str(check.error("a"))


def test_other_options_are_refused(tmp_path):
    result = mhmoe(tmp_path, "resume", "--check", "--until", "9")
    assert (result.code, "leave out --until" in result.err) == (2, True)
    assert mhmoe(tmp_path, "resume", "--json").code == 2
    assert_one_line(mhmoe(tmp_path, "resume", "--check"), RunError.exit_code, "it holds no run yet")
