"""Writing checkpoints while training goes on."""

import resource
import signal
from threading import Event

import pytest
import torch

from mhmoe_ray.checkpoint.manifest import newest_checkpoint, read_manifest, unfinished
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from tests.checkpoint.test_load import new_run
from tests.ranks import run_ranks
from tests.specs import tiny_spec
from tests.train import jobs


def state_of(trainer):
    """Return all weights and moments as whole tensors. Collective."""
    return jobs.whole(trainer.strategy.weights() | trainer.strategy.moments())


def saved_while_training(spec, path):
    """Save three checkpoints while training goes on, and return the state at the begin of each."""
    run, trainer = RunDir(path), jobs.trainer_of(spec)
    jobs.train(spec, trainer, 2)
    saver = Saver(run, trainer, group=1)
    kept = []
    for _ in range(3):
        kept.append(state_of(trainer))
        saver.save(trainer.zero_counts())
        jobs.train(spec, trainer, 1)  # while it is written
    saver.wait()
    return kept


@pytest.mark.parametrize(("workers", "ep", "strategy"), [(1, 1, "ddp"), (2, 2, "fsdp"), (2, 2, "zero1")])
def test_a_checkpoint_holds_the_state_of_its_own_step(tmp_path, workers, ep, strategy):
    spec, run = new_run(tmp_path, {"workers": workers, "ep": ep, "strategy": strategy})
    [expected, *_] = run_ranks(workers, saved_while_training, spec, run.path)
    for step, state in zip((2, 3, 4), expected, strict=True):
        checkpoint = run.checkpoints / f"step_{step:08d}.1"
        assert read_manifest(checkpoint).step == step
        loaded = jobs.load_and_describe(spec.model_copy(update={"cluster": type(spec.cluster)()}), checkpoint)
        found = loaded["weights"] | loaded["moments"]
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], t) for name, t in state.items())
    assert [e["step"] for e in events.events(run) if e["event"] == "checkpoint"] == [2, 3, 4]


def test_an_update_waits_until_there_is_a_copy_of_the_state(tmp_path, monkeypatch):
    spec, run = new_run(tmp_path, {"workers": 1})
    trainer = jobs.trainer_of(spec)
    jobs.train(spec, trainer, 1)
    saver, copy, updated, before_the_copy = Saver(run, trainer, group=1), Saver._copy, Event(), []

    def slow_copy(*args):
        before_the_copy.append(updated.wait(0.5))
        copy(*args)

    monkeypatch.setattr(Saver, "_copy", slow_copy)
    expected = state_of(trainer)
    sums = trainer.accumulate(jobs.batches(spec, 1, trainer))
    saver.save(trainer.zero_counts())
    trainer.update(sums)
    updated.set()
    saver.wait()
    assert before_the_copy == [False]
    found = jobs.load_and_describe(spec, newest_checkpoint(run)[0])
    assert all(torch.equal(t, (found["weights"] | found["moments"])[name]) for name, t in expected.items())
    assert not torch.equal(trainer.model.norm.weight, expected["norm.weight"])


def refused(spec, path):
    """Save a second checkpoint for which rank 1 may not write files as large as it must, and return the error's
    text."""
    run, trainer = RunDir(path), jobs.trainer_of(spec)
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
        assert saver.failed
        return str(e)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return None


def test_what_one_rank_cannot_write_all_refuse_and_the_checkpoint_before_stays(tmp_path):
    spec, run = new_run(tmp_path, {"workers": 2, "ep": 2})
    for told in run_ranks(2, refused, spec, run.path):
        assert "step_00000002.1: rank 1 cannot write it: File too large; make room" in told
    checkpoint, manifest, skipped = newest_checkpoint(run)
    assert (checkpoint.name, manifest.step, skipped) == ("step_00000001.1", 1, [])
    assert [path.name for path in unfinished(run)] == ["step_00000002.1"]


def test_a_history_that_cannot_be_read_costs_no_checkpoint(tmp_path, capfd):
    """Older checkpoints stay in this case, since it is not known which is the best."""
    spec, run = new_run(tmp_path, {"workers": 1})
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"keep_checkpoints": 1})})
    trainer = jobs.trainer_of(spec)
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
    assert "to remove: [Errno 21] Is a directory" in capfd.readouterr().out


def shares(spec, path):
    trainer = jobs.trainer_of(spec)
    jobs.train(spec, trainer, 1)
    jobs.save(RunDir(path), trainer)


def test_ranks_share_out_what_they_all_hold(tmp_path):
    """No rank writes more than its even share and one tensor."""
    spec, run = new_run(tmp_path, {"workers": 4, "ep": 2})
    run_ranks(4, shares, spec, run.path)
    files = newest_checkpoint(run)[1].files
    sizes = [sum(entry.size for name, entry in files.items() if f"_{rank:05d}." in name) for rank in range(4)]
    largest = 300 * 32 * 4
    assert len(files) == 8
    assert max(sizes) - min(sizes) < largest


def saved_before_any_update(spec, path):
    trainer = jobs.trainer_of(spec)
    jobs.save(RunDir(path), trainer)


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "fsdp"), (2, "zero2")])
def test_a_checkpoint_before_the_first_update_has_moments_of_zero(tmp_path, workers, strategy):
    """Such a checkpoint arises where the gradients of all steps so far were not finite, so that every update was
    skipped."""
    spec, run = new_run(tmp_path, {"workers": workers, "strategy": strategy})
    run_ranks(workers, saved_before_any_update, spec, run.path)
    found = jobs.load_and_describe(tiny_spec(), newest_checkpoint(run)[0])
    assert len(found["moments"]) == 2 * len(found["weights"])
    assert not any(t.any() for t in found["moments"].values())
