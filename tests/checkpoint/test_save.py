"""Tests of checkpoints that are written while training goes on."""

import resource
import signal
from threading import Event

import pytest
import torch

from mhmoe_ray.checkpoint.manifest import newest_checkpoint, read_manifest, uncommitted_checkpoints
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, AttemptId, RunDir, add_attempt, require_newest_attempt
from tests.support.ranks import run_ranks
from tests.support.runs import new_run
from tests.support.specs import tiny_spec
from tests.train import jobs


def full_state(trainer):
    """Return all weights and moments as full tensors. This is a collective operation."""
    return jobs.full_tensors(trainer.strategy.checkpoint_weights() | trainer.strategy.checkpoint_moments())


def save_while_training(spec, path):
    """Train two steps, then save a checkpoint before each of three further steps, and return the full state at the
    start of each checkpoint."""
    run, trainer = RunDir(path), jobs.build_trainer(spec)
    jobs.train(spec, trainer, 2)
    saver = Saver(run, trainer, group=1)
    states = []
    for _ in range(3):
        states.append(full_state(trainer))
        saver.save(trainer.zero_counts())
        jobs.train(spec, trainer, 1)  # this step trains while the checkpoint is written
    saver.wait()
    return states


@pytest.mark.parametrize(("workers", "ep", "strategy"), [(1, 1, "ddp"), (2, 2, "fsdp"), (2, 2, "zero1")])
def test_checkpoint_holds_the_state_of_its_step(tmp_path, workers, ep, strategy):
    spec, run = new_run(tmp_path, {"workers": workers, "ep": ep, "strategy": strategy})
    [expected, *_] = run_ranks(workers, save_while_training, spec, run.path)
    for step, state in zip((2, 3, 4), expected, strict=True):
        checkpoint = run.checkpoints / f"step_{step:08d}.1"
        assert read_manifest(checkpoint).step == step
        loaded = jobs.load_and_describe(spec.model_copy(update={"cluster": type(spec.cluster)()}), checkpoint)
        loaded_tensors = loaded["weights"] | loaded["moments"]
        assert loaded_tensors.keys() == state.keys()
        assert all(torch.equal(loaded_tensors[name], t) for name, t in state.items())
    assert [e["step"] for e in events.read(run) if e["event"] == "checkpoint"] == [2, 3, 4]


def test_manifest_has_the_tokens_that_end_answers(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 1})
    trainer = jobs.build_trainer(spec)
    saver = Saver(run, trainer, 1, ends={7, 3})
    saver.save(trainer.zero_counts())
    saver.wait()
    assert newest_checkpoint(run).manifest.ends == [3, 7]


def test_update_waits_for_the_copy_of_the_state(tmp_path, monkeypatch):
    """The checkpoint has the weights before the update, though the copy of the state is slow."""
    spec, run = new_run(tmp_path, {"workers": 1})
    trainer = jobs.build_trainer(spec)
    jobs.train(spec, trainer, 1)
    saver, copy_state, update_done, updates_before_copy = Saver(run, trainer, group=1), Saver._copy_state, Event(), []

    def slow_copy(*args):
        updates_before_copy.append(update_done.wait(0.5))
        copy_state(*args)

    monkeypatch.setattr(Saver, "_copy_state", slow_copy)
    expected = full_state(trainer)
    sums = trainer.accumulate(jobs.rank_batches(spec, 1, trainer))
    saver.save(trainer.zero_counts())
    trainer.update(sums)
    update_done.set()
    saver.wait()
    assert updates_before_copy == [False]
    loaded = jobs.load_and_describe(spec, newest_checkpoint(run)[0])
    assert all(torch.equal(t, (loaded["weights"] | loaded["moments"])[name]) for name, t in expected.items())
    assert not torch.equal(trainer.model.norm.weight, expected["norm.weight"])


def save_with_failing_rank(spec, path):
    """Save a checkpoint, then a second one whose file is larger than rank 1 may write; return the error's text."""
    run, trainer = RunDir(path), jobs.build_trainer(spec)
    jobs.train(spec, trainer, 1)
    saver = Saver(run, trainer, group=1)
    saver.save(trainer.zero_counts())
    saver.wait()
    jobs.train(spec, trainer, 1)
    if trainer.mesh.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    saver.save(trainer.zero_counts())
    try:
        saver.wait()
    except CheckpointError as e:
        assert saver.has_failed
        return str(e)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return None


def test_write_failure_of_one_rank_is_raised_on_all_ranks(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 2, "ep": 2})
    for message in run_ranks(2, save_with_failing_rank, spec, run.path):
        assert "step_00000002.1: rank 1 cannot write it: File too large; make room" in message
    checkpoint, manifest, skipped = newest_checkpoint(run)
    assert (checkpoint.name, manifest.step, skipped) == ("step_00000001.1", 1, [])
    assert [path.name for path in uncommitted_checkpoints(run)] == ["step_00000002.1"]


def test_older_attempt_commits_no_checkpoint(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 1})
    trainer = jobs.build_trainer(spec)
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:9", local=True, token="a"))
    saver = Saver(run, trainer, 1, before_commit=lambda: require_newest_attempt(run, AttemptId(1, "a")))
    saver.save(trainer.zero_counts())
    saver.wait()
    jobs.train(spec, trainer, 1)
    add_attempt(run, Attempt("job-2", "http://127.0.0.1:9", local=True, token="b"))
    saver.save(trainer.zero_counts())
    with pytest.raises(CheckpointError, match="it was resumed elsewhere"):
        saver.wait()
    assert newest_checkpoint(run).manifest.step == 0
    assert [e["step"] for e in events.read(run)] == [0]
    assert [file.name for file in run.routing.iterdir()] == ["step_00000000.1.json"]


def test_unreadable_history_removes_no_checkpoint(tmp_path, capfd):
    """The best checkpoint is unknown while the history cannot be read, so all are kept; later they are removed."""
    spec, run = new_run(tmp_path, {"workers": 1})
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"keep_checkpoints": 1})})
    trainer = jobs.build_trainer(spec)
    saver = Saver(run, trainer, group=1)
    run.metrics_file.mkdir()
    for step in (1, 2, 3):
        jobs.train(spec, trainer, 1)
        if step == 3:
            run.metrics_file.rmdir()
        saver.save(trainer.zero_counts())
        saver.wait()
        assert [manifest.parent.name for manifest in sorted(run.checkpoints.glob("*/manifest.json"))] == {
            1: ["step_00000001.1"],
            2: ["step_00000001.1", "step_00000002.1"],
            3: ["step_00000003.1"],
        }[step]
    assert f"cannot be read: file {run.metrics_file}: it is no regular file" in capfd.readouterr().out


def save_after_one_step(spec, path):
    """Train one step, and save a checkpoint."""
    trainer = jobs.build_trainer(spec)
    jobs.train(spec, trainer, 1)
    jobs.save_checkpoint(RunDir(path), trainer)


def test_ranks_write_even_shares_of_replicated_tensors(tmp_path):
    """The bytes that any two ranks write differ by less than the largest tensor."""
    spec, run = new_run(tmp_path, {"workers": 4, "ep": 2})
    run_ranks(4, save_after_one_step, spec, run.path)
    files = newest_checkpoint(run)[1].files
    sizes = [sum(entry.size for name, entry in files.items() if f"_{rank:05d}." in name) for rank in range(4)]
    largest = 300 * 32 * 4
    assert len(files) == 8
    assert max(sizes) - min(sizes) < largest


def save_before_any_update(spec, path):
    """Save a checkpoint of step 0, for which the optimizer has no moments yet."""
    trainer = jobs.build_trainer(spec)
    jobs.save_checkpoint(RunDir(path), trainer)


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "fsdp"), (2, "zero2")])
def test_checkpoint_before_the_first_update_has_zero_moments(tmp_path, workers, strategy):
    """A run has such a checkpoint if all gradients so far were not finite, so that every update was skipped."""
    spec, run = new_run(tmp_path, {"workers": workers, "strategy": strategy})
    run_ranks(workers, save_before_any_update, spec, run.path)
    loaded = jobs.load_and_describe(tiny_spec(), newest_checkpoint(run)[0])
    assert len(loaded["moments"]) == 2 * len(loaded["weights"])
    assert not any(t.any() for t in loaded["moments"].values())
