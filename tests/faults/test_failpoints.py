"""Tests that let each operation on files fail once, and kill the process at each, and then go on.

The training needs no Ray: it saves, restores and deletes checkpoints and records metrics and events with the functions
that workers use. Data is prepared by the real pipeline, whose tasks run in the process of the driver, so that each of
their operations has a number. Failures in Ray's processes are in test_preparation.py.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import (
    committed_checkpoints,
    newest_checkpoint,
    read_manifest,
    uncommitted_checkpoints,
)
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.data.prepare import work
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.errors import MhmoeError
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run, list_runs, read_attempts
from mhmoe_ray.storage import remove_tree
from tests.checkpoint.huggingface.conftest import MODELS, export_run, make_run
from tests.data.prepare.prepare_serially import use_small_chunks
from tests.data.texts import make_documents, write_lines
from tests.support.events import append_line, record
from tests.support.failpoints import Failpoint, failing_operation
from tests.support.forked import FORKED
from tests.support.ray_in_process import ray_in_this_process
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


def write_raw_text(folder: Path) -> None:
    """Write two domains, one of which has two chunks, each with a bad line at the end."""
    for domain, count in {"a": 6, "b": 3}.items():
        lines = [json.dumps({"text": text}).encode() for text in make_documents(domain, count)]
        write_lines(folder / "raw" / domain / "one.jsonl", [*lines, b"no JSON"])


def prepare_data(folder: Path) -> None:
    """Prepare the raw text, without the reports of progress that depend on the time."""
    use_small_chunks()
    work.WRITE_SECONDS = inf
    with ray_in_this_process():
        prepare(tiny_spec(folder, data={"max_bad_lines": 2, "validation_fraction": 0.4}))


def prepared_files(folder: Path) -> object:
    """Return the prepared files, or None without a prepared folder."""
    prepared = folder / "prepared"
    return files_of_folder(prepared, folder) if prepared.exists() else None


def files_of_folder(folder: Path, root: Path) -> dict[Path, bytes]:
    """Return the files of a folder, without the path `root` that some contain."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes().replace(bytes(root), b"") for path in files}


def prepare_run(folder: Path) -> None:
    make_run(folder, MODELS["llama"])


def export_model(folder: Path) -> None:
    """Export the run to a folder, unless it is there."""
    [run] = list_runs(folder / "runs")
    if not (folder / "exported").exists():
        export_run(run, folder / "exported")


def exported_files(folder: Path) -> object:
    exported = folder / "exported"
    return files_of_folder(exported, folder) if exported.exists() else None


def prepare_exported_model(folder: Path) -> None:
    prepare_run(folder)
    export_model(folder)


def import_model(folder: Path) -> None:
    """Import the exported model as a run, unless it is there."""
    if imported_run(folder) is None:
        import_folder(folder / "exported", None, folder / "imported", None)


def imported_run(folder: Path) -> object:
    """Return the files and events of the imported run, without its id and times; None without a run."""
    runs = list_runs(folder / "imported") if (folder / "imported").exists() else []
    if not runs:
        return None
    [run] = runs
    files = files_of_folder(run.path, folder)
    names = {(event["event"], event["name"]) for event in events.read(run)}
    return {path: content for path, content in files.items() if path.name not in ("run.json", "events.jsonl")}, names


class Area(NamedTuple):
    """Work whose operations on files are failpoints."""

    prepare: Callable[[Path], object]
    """Function that prepares a folder."""
    work: Callable[[Path], object]
    """Function that does the work in the folder, and that can be repeated."""
    outcome: Callable[[Path], object]
    """Function that returns the result in the folder."""
    is_atomic: bool = False
    """True if the result is complete or None at any time, and each error is one of a user."""


AREAS = {
    "training": Area(prepare_training, train, outcome_of_run),
    "resumption": Area(prepare_interrupted_training, train, outcome_of_run),
    "attempts": Area(lambda folder: None, resume_twice, attempts_of_run),
    "preparation": Area(write_raw_text, prepare_data, prepared_files, is_atomic=True),
    "export": Area(prepare_run, export_model, exported_files, is_atomic=True),
    "import": Area(prepare_exported_model, import_model, imported_run, is_atomic=True),
}


def run_at_failpoint(area: str, folder: Path, failpoint: Failpoint | None, log: Path) -> None:
    """Do the work of an area, in a process of its own; write its operations to `log`, and a failure to a file."""
    with log.open("a", buffering=1) as log_file:
        try:
            with failing_operation(
                [folder], failpoint, lambda thread, operation: print(thread, *operation, file=log_file)
            ):
                AREAS[area].work(folder)
        except Exception as e:
            is_own = isinstance(e, MhmoeError if AREAS[area].is_atomic else MhmoeError | OSError)
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
    if AREAS[area].is_atomic and (result := AREAS[area].outcome(folder / "work")) not in (None, expected):
        return f"{failpoint}: half of the work counts as done: {result}"
    exit_code, error = run_process(area, folder / "work", None, folder / "second.log")
    if exit_code or error:
        return f"{failpoint}: it cannot go on: {exit_code} {error}"
    result = AREAS[area].outcome(folder / "work")
    shutil.rmtree(folder)
    return None if result == expected else f"{failpoint}: {result} is not {expected}"


def write_problems(area: str, kind: str, folder: Path, share: int) -> None:
    """Try the failpoints of an area whose number belongs to a share, and write their number and their problems."""
    torch.set_num_threads(1)
    template, undisturbed, log = (folder / name for name in ("template", f"undisturbed-{share}", f"log-{share}"))
    shutil.copytree(template, undisturbed)
    with ray_in_this_process():
        pass  # Forks inherit the modules that Ray imports when it is first used.
    assert run_process(area, undisturbed, None, log) == (0, "")
    expected = AREAS[area].outcome(undisturbed)
    threads = [line.split()[0] for line in log.read_text().splitlines()]
    failpoints = [
        Failpoint(thread, number, getattr(errno, kind, None))
        for thread in sorted(set(threads))
        for number in range(1, threads.count(thread) + 1)
    ]
    problems = []
    for number in range(share, len(failpoints), PROCESSES):
        point_folder = folder / str(number)
        point_folder.mkdir()
        problems.append(problem_at(area, template, point_folder, failpoints[number], expected))
    (folder / f"problems-{share}.json").write_text(json.dumps([len(failpoints), *filter(None, problems)]))


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "kill"])
@pytest.mark.parametrize("area", AREAS)
def test_each_operation_may_fail_once(tmp_path, area, kind):
    (tmp_path / "template").mkdir()
    AREAS[area].prepare(tmp_path / "template")
    processes = [FORKED.Process(target=write_problems, args=(area, kind, tmp_path, n)) for n in range(PROCESSES)]
    for process in processes:
        process.start()
    for share, process in enumerate(processes):
        process.join()
        count, *problems = json.loads((tmp_path / f"problems-{share}.json").read_text())
        assert problems == []
        assert count > 5
    print(f"{area}: {count} failpoints", flush=True)
