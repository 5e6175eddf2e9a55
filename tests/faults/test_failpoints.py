"""Tests that let each operation on the files of a run fail once, and kill the process at each, and then go on.

The training needs no Ray: it saves, restores and deletes checkpoints and records metrics and events with the functions
that workers use.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import (
    committed_checkpoints,
    newest_checkpoint,
    read_manifest,
    uncommitted_checkpoints,
)
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.data.prepare.work import clean_up, publish
from mhmoe_ray.errors import MhmoeError
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run, list_runs, read_attempts
from mhmoe_ray.storage import remove_tree, write_json
from tests.support.events import append_line, record
from tests.support.failpoints import Failpoint, failing_operation
from tests.support.forked import FORKED
from tests.support.runs import new_run
from tests.support.specs import tiny_spec
from tests.train import jobs

pytestmark = pytest.mark.slow

TRAIN = {"steps": 4, "keep_checkpoints": 1}
CHECKPOINT_STEPS = 2
PROCESSES = 2


def train(folder: Path) -> None:
    """Train the run in `folder` from its newest checkpoint to its last step, as its workers do."""
    [run] = [RunDir(path) for path in (folder / "runs").iterdir()]
    spec, newest = run.spec(), newest_checkpoint(run)
    for checkpoint in uncommitted_checkpoints(run):
        remove_tree(checkpoint)
    events.record(run, "restoring", name=newest and newest.checkpoint.name)
    trainer = jobs.build_trainer(spec)
    if newest:
        restore(trainer, newest.checkpoint, newest.manifest)
    group = 1 + sum(event["event"] == "started" for event in events.read(run))
    saver = Saver(run, trainer, group)
    record(run, "started", group=group)
    while trainer.step < spec.train.steps:
        batches = jobs.rank_batches(spec, trainer.step, trainer)
        digest = hashlib.sha256(b"".join(batch.token_BT.numpy().tobytes() for batch in batches)).hexdigest()
        sums = trainer.accumulate(batches)
        norm = trainer.update(sums).norm
        line = {metrics.GROUP: group, metrics.LOSS: sums.loss, metrics.GRAD_NORM: norm}
        append_line(run, trainer.step, **line, **{metrics.TOKENS: trainer.tokens, metrics.STREAM: digest})
        if trainer.step % CHECKPOINT_STEPS == 0:
            saver.save(trainer.zero_counts())
    saver.wait()
    events.record(run, "finished", step=trainer.step)


def outcome_of_run(folder: Path) -> object:
    """Return the metrics of each step, without the worker group, and the hashes of the last checkpoint."""
    [run] = [RunDir(path) for path in (folder / "runs").iterdir()]
    lines = [{**line, metrics.GROUP: None} for line in history.read(run)]
    assert events.state(events.read(run)) == "finished"
    assert uncommitted_checkpoints(run) == []
    return lines, read_manifest(committed_checkpoints(run)[-1]).files


def prepare_training(folder: Path) -> None:
    new_run(folder, {"workers": 1}, train=TRAIN)


def prepare_interrupted_training(folder: Path) -> None:
    """Prepare a run that was killed while it wrote its second checkpoint."""
    prepare_training(folder)
    train(folder)
    [run] = [RunDir(path) for path in (folder / "runs").iterdir()]
    [checkpoint] = committed_checkpoints(run)
    (checkpoint / "manifest.json").unlink()


def resume_twice(folder: Path) -> None:
    """Create a run if there is none, and record its attempts up to the third."""
    runs = list_runs(folder / "runs") if (folder / "runs").exists() else []
    run = runs[0] if runs else create_run(tiny_spec(folder))
    for number in range(len(read_attempts(run)) + 1, 4):
        add_attempt(run, Attempt(f"job-{number}", "http://x", local=True, submitted=number), number)


def attempts_of_run(folder: Path) -> object:
    [run] = list_runs(folder / "runs")
    return read_attempts(run)


def prepare_staging(folder: Path) -> None:
    result = folder / "data.partial-1" / "job" / "prepared"
    write_json(result / "shards" / "a.json", {"rows": 1})
    write_json(result / "manifest.json", {"shards": 1})
    write_json(folder / "data.partial-1" / "parts" / "a.json", {"tokens": [1, 2]})


def publish_and_clean_up(folder: Path) -> None:
    if not (folder / "data" / "manifest.json").exists():
        publish(folder / "data.partial-1" / "job" / "prepared", folder / "data")
    clean_up(folder / "data")


def files_of_folder(folder: Path) -> object:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


AREAS = {
    "training": (prepare_training, train, outcome_of_run),
    "resumption": (prepare_interrupted_training, train, outcome_of_run),
    "attempts": (lambda folder: None, resume_twice, attempts_of_run),
    "publishing": (prepare_staging, publish_and_clean_up, files_of_folder),
}
"""Functions of each area: one prepares a folder, one does the work and can be repeated, one returns the result."""


def run_at_failpoint(area: str, folder: Path, failpoint: Failpoint | None, log: Path) -> None:
    """Do the work of an area, in a process of its own; write its operations to `log`, and a failure to a file."""
    with log.open("a", buffering=1) as log_file:
        try:
            with failing_operation(
                [folder], failpoint, lambda thread, operation: print(thread, *operation, file=log_file)
            ):
                AREAS[area][1](folder)
        except Exception as e:
            is_own = isinstance(e, MhmoeError | OSError)
            log.with_suffix(".error").write_text(f"{'' if is_own else 'unexpected '}{type(e).__name__}: {e}")


def run_process(area: str, folder: Path, failpoint: Failpoint | None, log: Path) -> tuple[int, str]:
    """Run `run_at_failpoint` in a fork of this process; return its exit code, and the error that it raised."""
    pid = os.fork()
    if not pid:
        try:
            run_at_failpoint(area, folder, failpoint, log)
            os._exit(0)
        finally:
            os._exit(1)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    error_file = log.with_suffix(".error")
    return exit_code, error_file.read_text() if error_file.exists() else ""


def problem_at(area: str, template: Path, folder: Path, failpoint: Failpoint, expected: object) -> str | None:
    """Fail at a failpoint and go on; return what is wrong afterwards, or None."""
    shutil.copytree(template, folder / "work")
    exit_code, error = run_process(area, folder / "work", failpoint, folder / "first.log")
    if failpoint.error is None and exit_code != -signal.SIGKILL:
        return f"{failpoint}: it was not killed, but ended with {exit_code} {error}"
    if "\n" in error or error.startswith("unexpected"):
        return f"{failpoint}: {error}"
    exit_code, error = run_process(area, folder / "work", None, folder / "second.log")
    if exit_code or error:
        return f"{failpoint}: it cannot go on: {exit_code} {error}"
    result = AREAS[area][2](folder / "work")
    shutil.rmtree(folder)
    return None if result == expected else f"{failpoint}: {result} is not {expected}"


def write_problems(area: str, kind: str, folder: Path, share: int) -> None:
    """Try the failpoints of an area whose number belongs to a share, and write their number and their problems."""
    torch.set_num_threads(1)
    template, undisturbed, log = (folder / name for name in ("template", f"undisturbed-{share}", f"log-{share}"))
    shutil.copytree(template, undisturbed)
    assert run_process(area, undisturbed, None, log) == (0, "")
    expected = AREAS[area][2](undisturbed)
    threads = [line.split()[0] for line in log.read_text().splitlines()]
    failpoints = [
        Failpoint(thread, number, None if kind == "kill" else (errno.EIO, errno.ENOSPC)[number % 2])
        for thread in sorted(set(threads))
        for number in range(1, threads.count(thread) + 1)
    ]
    problems = []
    for number in range(share, len(failpoints), PROCESSES):
        point_folder = folder / str(number)
        point_folder.mkdir()
        problems.append(problem_at(area, template, point_folder, failpoints[number], expected))
    (folder / f"problems-{share}.json").write_text(json.dumps([len(failpoints), *filter(None, problems)]))


@pytest.mark.parametrize("kind", ["error", "kill"])
@pytest.mark.parametrize("area", AREAS)
def test_each_operation_may_fail_once(tmp_path, area, kind):
    (tmp_path / "template").mkdir()
    AREAS[area][0](tmp_path / "template")
    processes = [FORKED.Process(target=write_problems, args=(area, kind, tmp_path, n)) for n in range(PROCESSES)]
    for process in processes:
        process.start()
    for share, process in enumerate(processes):
        process.join()
        count, *problems = json.loads((tmp_path / f"problems-{share}.json").read_text())
        assert problems == []
        assert count > 5
    print(f"{area}: {count} failpoints", flush=True)
