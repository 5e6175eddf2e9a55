"""`mhmoe list`, `resume`, `stop` and `rm`: the runs of a storage folder."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mhmoe_ray.cli import common
from mhmoe_ray.cli.common import (
    STORAGE,
    AddressOption,
    DetachOption,
    ForceOption,
    JsonOption,
    RunArg,
    SetOption,
    StorageOption,
    note,
    out,
    print_json,
    print_note,
)
from mhmoe_ray.cli.follow import follow_run
from mhmoe_ray.cli.submit import final_outcome, resume_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.directory import Attempt, RunDir
    from mhmoe_ray.spec import RunSpec


def list_(
    name: Annotated[
        str | None, typer.Argument(help="List only runs whose ids begin with this.", show_default=False)
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(help="List only runs in this state; may be given several times.", show_default=False),
    ] = None,
    creation_text: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="List only runs created since: 90s, 10m, 2h, 1d ago, or 2026-11-26."
        ),
    ] = None,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """List runs, newest last, with their states from their directories or, while they run, from their clusters.

    For example `mhmoe list tiny --state running --since 1d`.
    """
    from mhmoe_ray.cli.logs import parse_time
    from mhmoe_ray.cluster.connect import cached_connect
    from mhmoe_ray.runs.directory import list_runs

    start_time = parse_time(creation_text) if creation_text else 0.0
    matching_runs = [
        run for run in list_runs(storage) if run.id.startswith(name or "") and run.creation_time() >= start_time
    ]
    # Many runs share a cluster, and a connection to a cluster that does not answer takes until the timeout, so each
    # cluster is tried only once.
    connect = cached_connect()
    rows = [row for row in (_run_row(run, connect) for run in matching_runs) if not state or row["state"] in state]
    if json:
        print_json(rows)
        return
    table = Table("run", "preset", "state", "step", "loss", "created", box=None, pad_edge=False)
    for row in rows:
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else ""
        created_text = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        step = f"{row['step']}/{row['steps']}" if row["steps"] is not None else ""
        table.add_row(row["run"], row["preset"] or "", row["state"], step, loss, created_text)
    filter_text = " match the filters" if name or state or creation_text else ""
    out.print(table if rows else f"no runs in {storage}{filter_text}")


def _run_row(run: "RunDir", connect: "Callable[[str], Connection]") -> dict[str, Any]:
    """Return a run's row of the list, as `mhmoe list --json` prints it.

    Args:
        run: the run.
        connect: function that connects to the cluster at an address.
    """
    from mhmoe_ray.cluster.runs import state_of
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.runs import events, history, metrics

    last_metrics = history.last_line(run)
    steps: int | str | None = None
    preset = None
    try:
        if not run.is_imported:
            spec = run.spec()
            steps, preset = spec.train.steps, spec.origin
        state, _, _ = state_of(run, events.read(run), connect)
    # Another version may have written a spec that this one cannot read. The other runs should still be listed.
    except SpecError:
        steps, state = "?", "unreadable spec"
    return {
        "run": run.id,
        "state": state,
        "step": last_metrics[metrics.STEP] if last_metrics else 0,
        "steps": steps,
        "preset": preset,
        "loss": last_metrics[metrics.LOSS] if last_metrics else None,
        "created": run.creation_time(),
        "path": str(run.path),
    }


def resume(
    run: RunArg = None,
    last_step: Annotated[
        int | None,
        typer.Option(
            "--until",
            metavar="STEPS",
            min=1,
            help="Train up to this step, also if the run is finished.",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    detach: DetachOption = False,
    force: ForceOption = False,
) -> None:
    """Resume a run that stopped, failed or lost its cluster, from its newest complete checkpoint.

    It runs on the same cluster as before, unless an address is given. Only keys of the cluster section may change: with
    them the run goes on exactly as it would have. With --until, a run trains longer than its spec says, also if it is
    finished. A learning rate that has decayed stays at its end, min_lr.
    """
    from mhmoe_ray.errors import RunError, SpecError
    from mhmoe_ray.runs.directory import find_run, last_attempt
    from mhmoe_ray.spec import load_resolved_spec, parse_overrides

    run_dir = find_run(run, storage, with_job=True)
    for keys, _ in parse_overrides(set_):
        if keys[0] != "cluster":
            reason = "a resumed run must go on exactly as it would have"
            raise SpecError(f"override {'.'.join(keys)}", reason, "change only cluster keys, or submit a new run")
    previous_attempt = last_attempt(run_dir)
    run_outcome = final_outcome(run_dir, force)
    if run_outcome.state == "finished" and last_step is None:
        raise RunError(f"run {run_dir.id}", "it is finished", "give --until to train it longer")
    spec = run_dir.relocated_spec(load_resolved_spec(run_dir.spec_file, set_))
    if last_step is not None:
        spec = _extended_spec(run_dir, spec, last_step)
    connection = resume_run(run_dir, spec, address or _attempt_address(previous_attempt))
    # `from_now` leaves out the progress of earlier attempts, because it was shown when it happened.
    if not detach:
        follow_run(run_dir, connection, from_now=True)


def _extended_spec(run: "RunDir", spec: "RunSpec", steps: int) -> "RunSpec":
    """Return the spec of a run with more steps, whose first steps stay as they are.

    Raises:
        RunError: the spec has at least as many steps already, or the order of its samples depends on their number.
    """
    from mhmoe_ray.errors import RunError

    train = spec.train
    if steps <= train.steps:
        fix = "give --until a larger number; a run with fewer steps ends by `mhmoe stop`"
        raise RunError(f"run {run.id}", f"its spec has {train.steps:,} steps already", fix)
    if any(source.max_epochs is not None or source.max_epochs_of for source in spec.data.sources.values()):
        reason = "its sources have max_epochs, so the order of its samples depends on the number of steps"
        fix = f"submit a branch: start: {{from: {run.id}, optimizer: true, order: continue}}"
        raise RunError(f"run {run.id}", reason, fix)
    changes: dict[str, int] = {"steps": steps}
    if train.schedule != "constant":
        changes["schedule_steps"] = train.last_decay_step
        note.print(
            f"the learning rate stays at {train.min_lr:g} after step {train.last_decay_step:,}; for another schedule, "
            "submit a branch that starts from an earlier checkpoint (start.from: RUN@STEP)",
            soft_wrap=True,
        )
    return spec.model_copy(update={"train": train.model_copy(update=changes)})


def _attempt_address(attempt: "Attempt") -> str:
    """Return the cluster that the attempt ran on, as --address takes it: its URL, or the name of the local cluster."""
    from mhmoe_ray.cluster.connect import LOCAL

    # A local cluster that was restarted has another address but the same name, so its name is returned.
    return LOCAL if attempt.local else attempt.address


POLL_SECONDS = 0.5
"""Seconds between two checks whether a run that is stopped has ended."""


def stop(
    run: RunArg = None,
    end_immediately: Annotated[
        bool, typer.Option("--now", help="End its job at once, without a last checkpoint.")
    ] = False,
    storage: StorageOption = STORAGE,
) -> None:
    """Ask a run to end: its workers finish their step, validate, save a checkpoint and stop. `resume` continues it.

    A run whose workers are not training yet is ended at once.
    """
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.dashboard import RetryingCaller
    from mhmoe_ray.cluster.runs import outcome, recorded_outcome
    from mhmoe_ray.errors import ClusterError, RunError, TokenError
    from mhmoe_ray.runs import events
    from mhmoe_ray.runs.directory import find_run, last_attempt

    run_dir = find_run(run, storage, with_job=True)
    attempt = last_attempt(run_dir)
    run_events = events.read(run_dir)
    run_outcome = recorded_outcome(run_events)
    if run_outcome:
        raise RunError(f"run {run_dir.id}", f"it is {run_outcome.state} already", "see `mhmoe status`")
    is_training = events.state(run_events) == "running"
    try:
        connection = connect(attempt.address)
    # A TokenError is also a ClusterError, but here the cluster answers. It is raised again, so that the user gives the
    # cluster's token.
    except TokenError:
        raise
    except ClusterError as e:
        if end_immediately or not is_training:
            raise
        # The cluster may run within a batch job, where no command can reach it. The workers still read the run
        # directory, so the stop file there stops them.
        run_dir.stop_file.touch()
        note.print(
            f"its workers are asked to stop through its directory; this machine cannot see whether they do: {e.reason}",
            soft_wrap=True,
        )
        return
    run_dir.stop_file.touch()
    # Connecting may have taken long, so the state of the run is read again.
    if end_immediately or events.state(events.read(run_dir)) != "running":
        jobs.stop(connection, attempt.job)
    else:
        note.print("waiting for its last checkpoint; `mhmoe stop --now` ends it without one")
    retrying_caller = RetryingCaller(print_note)
    while (run_outcome := retrying_caller.call(lambda: outcome(run_dir, connection), None)) is None:
        time.sleep(POLL_SECONDS)
    # If Ray ended the job, the job's driver could not record the end of the run, so this command records it.
    if run_outcome.state == "stopped" and recorded_outcome(events.read(run_dir)) is None:
        events.record(run_dir, "stopped", reason="its job was ended")
    out.print(
        f"run {run_dir.id} {run_outcome.state}{': ' + run_outcome.reason if run_outcome.reason else ''}", soft_wrap=True
    )


DASHBOARD_WAIT_SECONDS = 60.0
"""Seconds to wait for a busy dashboard before a run is removed.

The wait is long because a run that is served must not be removed: its replicas would lose the files.
"""


def rm(
    runs: Annotated[
        list[str], typer.Argument(help="Ids of runs, beginnings of ids, or paths.", autocompletion=common.complete_runs)
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove them without asking.")] = False,
    force: ForceOption = False,
    storage: StorageOption = STORAGE,
) -> None:
    """Remove runs that are over or lost their cluster, with their checkpoints. This cannot be undone.

    For example `mhmoe rm tiny-3f tiny-9a`.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import find_run
    from mhmoe_ray.storage import remove_tree

    # All runs are found and checked before the first one is removed, so that an error removes nothing. A name that is
    # given twice counts once.
    run_dirs = [find_run(name, storage) for name in dict.fromkeys(runs)]
    for run in run_dirs:
        _check_removable(run, force)
    names = ", ".join(run.id for run in run_dirs)
    if not yes:
        if not sys.stdin.isatty():
            raise RunError(
                f"runs {names}", "there is no terminal on which you could confirm", "give --yes to remove them"
            )
        if not typer.confirm(f"remove {names}, with all checkpoints?", err=True):
            note.print("nothing was removed")
            return
        # The user's answer may have taken long, so the runs are checked again: one may have been resumed or served
        # meanwhile.
        for run in run_dirs:
            _check_removable(run, force)
    for run in run_dirs:
        remove_tree(run.path)
        out.print(f"removed {run.id}")


def _check_removable(run: "RunDir", force: bool) -> None:
    """Raise an error if a run must not be removed, because it may run or is served.

    Raises:
        RunError: the run is running, may still be running (unless `force`), or is served.
        TokenError: its cluster requires a token that this machine does not have, so its state is unknown.
    """
    from mhmoe_ray.cluster.runs import serving_applications
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events

    final_outcome(run, force)
    for application in serving_applications(run, events.read(run), DASHBOARD_WAIT_SECONDS):
        if application["status"] != "unknown":
            raise RunError(
                f"run {run.id}",
                f"it is served at {application['url']}",
                f"stop serving it first: mhmoe serve down {application['application']}",
            )
