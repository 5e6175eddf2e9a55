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
    say,
)
from mhmoe_ray.cli.follow import follow
from mhmoe_ray.cli.submit import ended, go_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.directory import Attempt, RunDir


def list_(
    name: Annotated[str | None, typer.Argument(help="Only runs whose ids begin so.", show_default=False)] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="Only runs in this state; may be given several times.", show_default=False)
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only runs made since: 90s, 10m, 2h, 1d ago, or 2026-11-26.")
    ] = None,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """List runs, newest last: from their directories and, for runs that are not over, their clusters.

    For example `mhmoe list tiny --state running --since 1d`.
    """
    from mhmoe_ray.cli.logs import moment
    from mhmoe_ray.cluster.connect import each_once
    from mhmoe_ray.runs.directory import list_runs

    start = moment(since) if since else 0.0
    wanted = [run for run in list_runs(storage) if run.id.startswith(name or "") and run.created() >= start]
    connected = each_once()
    found = [row for row in (_row(run, connected) for run in wanted) if not state or row["state"] in state]
    if json:
        print_json(found)
        return
    table = Table("run", "preset", "state", "step", "loss", "created", box=None, pad_edge=False)
    for row in found:
        loss = f"{row['loss']:.3f}" if row["loss"] is not None else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        step = f"{row['step']}/{row['steps']}" if row["steps"] is not None else ""
        table.add_row(row["run"], row["preset"] or "", row["state"], step, loss, when)
    fewer = " that are so" if name or state or since else ""
    out.print(table if found else f"no runs in {storage}{fewer}")


def _row(run: "RunDir", connected: "Callable[[str], Connection]") -> dict[str, Any]:
    from mhmoe_ray.cluster.runs import state_of
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.runs import events, history, metrics

    last = history.last(run)
    steps: int | str | None = None
    preset = None
    try:
        if not run.is_imported:
            spec = run.spec()
            steps, preset = spec.train.steps, spec.origin
        state, _, _ = state_of(run, events.events(run), connected)
    except SpecError:  # written by another version; the other runs are still worth a list
        steps, state = "?", "unreadable spec"
    return {
        "run": run.id,
        "state": state,
        "step": last[metrics.STEP] if last else 0,
        "steps": steps,
        "preset": preset,
        "loss": last[metrics.LOSS] if last else None,
        "created": run.created(),
        "path": str(run.path),
    }


def resume(
    run: RunArg = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
    detach: DetachOption = False,
    force: ForceOption = False,
) -> None:
    """Resume a run that stopped, failed or lost its cluster, from its newest complete checkpoint.

    It runs on the same cluster as before, unless an address is given. Only keys of the cluster section may change: with
    them the run goes on exactly as it would have.
    """
    from mhmoe_ray.errors import RunError, SpecError
    from mhmoe_ray.runs.directory import find_run, last_attempt
    from mhmoe_ray.spec import load_resolved_spec, parse_overrides

    found = find_run(run, storage, with_job=True)
    for keys, _ in parse_overrides(set_):
        if keys[0] != "cluster":
            why = "a resumed run must go on exactly as it would have"
            raise SpecError(f"override {'.'.join(keys)}", why, "change only cluster keys, or submit a new run")
    before = last_attempt(found)
    over = ended(found, force)
    if over.state == "finished":
        raise RunError(f"run {found.id}", "it is finished", "submit a new run to train longer")
    spec = found.relocated(load_resolved_spec(found.spec_file, set_))
    connection = go_on(found, spec, address or _where(before))
    if not detach:
        follow(found, connection, from_now=True)


def _where(attempt: "Attempt") -> str:
    """Return the cluster that the attempt ran on, as commands take it.

    A local cluster is named `local`, because a new one has another address.
    """
    from mhmoe_ray.cluster.connect import LOCAL

    return LOCAL if attempt.local else attempt.address


POLL_SECONDS = 0.5


def stop(
    run: RunArg = None,
    now: Annotated[bool, typer.Option("--now", help="End its job at once, without a last checkpoint.")] = False,
    storage: StorageOption = STORAGE,
) -> None:
    """Ask a run to end: its workers finish their step, validate, save a checkpoint and stop. `resume` continues it.

    A run whose workers are not training yet is ended at once.
    """
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.cluster.runs import outcome, recorded_outcome
    from mhmoe_ray.errors import ClusterError, RunError, TokenError
    from mhmoe_ray.runs import events
    from mhmoe_ray.runs.directory import find_run, last_attempt

    found = find_run(run, storage, with_job=True)
    attempt = last_attempt(found)
    happened = events.events(found)
    over = recorded_outcome(happened)
    if over:
        raise RunError(f"run {found.id}", f"it is {over.state} already", "see `mhmoe status`")
    trains = events.state(happened) == "running"
    try:
        connection = connect(attempt.address)
    except TokenError:
        raise
    except ClusterError as e:
        if now or not trains:
            raise
        # Its cluster may be within a batch job, where no command reaches it; workers read the directory.
        found.stop_file.touch()
        note.print(f"asked for in its directory; whether it happens is not seen from here: {e.why}", soft_wrap=True)
        return
    found.stop_file.touch()
    if now or events.state(events.events(found)) != "running":  # to connect may have taken long
        jobs.stop(connection, attempt.job)
    else:
        note.print("waiting for its checkpoint; `mhmoe stop --now` does not")
    patience = Patience(say)
    while (over := patience.ask(lambda: outcome(found, connection), None)) is None:
        time.sleep(POLL_SECONDS)
    if over.state == "stopped" and recorded_outcome(events.events(found)) is None:
        events.record(found, "stopped", reason="its job was ended")
    out.print(f"run {found.id} {over.state}{': ' + over.reason if over.reason else ''}", soft_wrap=True)


ASK_SECONDS = 60.0
"""Seconds to wait for a dashboard that is busy.

A run that is served must not be removed: its replicas would lose the files.
"""


def rm(
    runs: Annotated[list[str], typer.Argument(help="Ids, beginnings of ids, or paths.", autocompletion=common.runs)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: ForceOption = False,
    storage: StorageOption = STORAGE,
) -> None:
    """Remove runs that are over or lost their cluster, with their checkpoints. This cannot be undone.

    For example `mhmoe rm tiny-3f tiny-9a`.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import find_run
    from mhmoe_ray.storage import remove_tree

    found = [find_run(name, storage) for name in dict.fromkeys(runs)]
    for run in found:
        _check(run, force)
    names = ", ".join(run.id for run in found)
    if not yes:
        if not sys.stdin.isatty():
            raise RunError(f"runs {names}", "nobody is there to be asked", "give --yes if they are to be removed")
        if not typer.confirm(f"remove {names}, with all checkpoints?", err=True):
            note.print("nothing was removed")
            return
        for run in found:  # to answer may have taken long
            _check(run, force)
    for run in found:
        remove_tree(run.path)
        out.print(f"removed {run.id}")


def _check(run: "RunDir", force: bool) -> None:
    """Check that a run may be removed.

    Raises:
        RunError: the run is running, may still be running, or is served.
        TokenError: its cluster requires a token that this machine does not have, so its state cannot be told.
    """
    from mhmoe_ray.cluster.runs import served
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events

    ended(run, force)
    for where in served(run, events.events(run), ASK_SECONDS):
        if where["status"] != "unknown":
            raise RunError(
                f"run {run.id}",
                f"it is served at {where['url']}",
                f"take it away first: mhmoe serve down {where['application']}",
            )
