"""`mhmoe list`, `resume`, `stop` and `rm`: the runs of a storage folder."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mhmoe_ray as mh
from mhmoe_ray.cli import options
from mhmoe_ray.cli.follow import follow_run
from mhmoe_ray.cli.formats import format_count, format_figure
from mhmoe_ray.cli.output import note, out, print_json, print_line, print_note, print_table, show_activity

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.train.repetition import ResumeCheck

SHOWN_STEPS = 20
"""Number of repeated steps, or of tensors, up to which `resume --check` prints all."""


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
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """List runs, newest last, with their states from their directories or, while they run, from their clusters.

    For example `mhmoe list tiny --state running --since 1d`.
    """
    show_activity("reading the runs")
    from mhmoe_ray.cli.logs import parse_time
    from mhmoe_ray.cluster.connect import cached_connect
    from mhmoe_ray.runs.directory import list_runs

    start_time = parse_time(creation_text) if creation_text else 0.0
    matching_runs = [
        run for run in list_runs(storage) if run.id.startswith(name or "") and run.creation_time() >= start_time
    ]
    # Many runs share a cluster, and one that does not answer takes until the timeout, so each is tried once.
    connect = cached_connect()
    all_rows = [_run_row(run, connect) for run in matching_runs]
    states = {row["state"] for row in all_rows}
    rows = [row for row in all_rows if not state or row["state"] in state]
    if json:
        print_json(rows)
        return
    cells = []
    for row in rows:
        loss = format_figure(row["loss"], ".3f", "")
        created_text = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        step = f"{row['step']}/{row['steps']}" if row["steps"] is not None else ""
        cells.append([row["run"], row["preset"] or "", row["state"], step, loss, created_text])
    if rows:
        columns = ["run", "preset", "state", "step", "loss", "created"]
        print_table(columns, cells, names=columns)
    else:
        filter_text = " match the filters" if name or state or creation_text else ""
        states_text = f"; their states are {', '.join(sorted(states))}" if states else ""
        out.print(f"no runs in {storage}{filter_text}{states_text}")


def _run_row(run: "RunDir", connect: "Callable[[str], Connection]") -> dict[str, Any]:
    """Return a run's row of the list, as `mhmoe list --json` prints it."""
    from mhmoe_ray.cluster.runs import state_of
    from mhmoe_ray.errors import SpecError, StorageError
    from mhmoe_ray.runs import events, history, metrics

    last_metrics = None
    steps: int | str | None = None
    preset = None
    try:
        last_metrics = history.last_line(run)
        if not run.is_imported:
            spec = run.spec()
            steps, preset = spec.train.steps, spec.origin
        state, _, _ = state_of(run, events.read(run), connect)
    # A spec that another version wrote may be unreadable; the other runs are still listed.
    except SpecError:
        steps, state = "?", "unreadable spec"
    except StorageError:
        state = "unreadable events or metrics"
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
    run: options.RunArg = None,
    last_step: Annotated[
        int | None,
        typer.Option(
            "--until",
            metavar="STEPS",
            min=1,
            help="Train up to this step, even if the run is finished.",
            show_default=False,
        ),
    ] = None,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    storage: options.StorageOption = options.STORAGE,
    address: options.AddressOption = None,
    detach: options.DetachOption = False,
    force: options.ForceOption = False,
    trust_run: options.TrustOption = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Change nothing: repeat the steps before the last checkpoint, and compare them."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --check: print the result as JSON.")] = False,
) -> None:
    """Resume a run that stopped, failed or lost its cluster, from its newest complete checkpoint.

    It runs on the same cluster as before, unless an address is given. With --set, only keys of the cluster section
    and train.profile may change once the run has done a step, because it must go on exactly as it would have. With
    --until, a run trains longer than its spec says, even if it is finished. A learning rate that has decayed stays at
    its last value, min_lr.

    With --check, the run stays as it is. The steps between its last two checkpoints are trained again beside it, and
    their losses, gradient norms and samples and the last checkpoint are compared: bit by bit on CPUs.
    """
    if check and (last_step or set_ or detach):
        raise typer.BadParameter("--check changes nothing and waits: leave out --until, --set and --detach")
    if json and not check:
        raise typer.BadParameter("--json prints the result of --check: give that too")
    show_activity("looking for the newest checkpoint")
    ended_run = mh.find_run(run, storage)
    if check:
        _show_check(
            ended_run, ended_run.check_resume(address, force=force, trust_run=trust_run, on_note=print_note), json
        )
        return
    ended_run.resume(last_step, set_, address, force=force, trust_run=trust_run, on_note=print_note)
    # `from_now` leaves out the progress of earlier attempts, because it was shown when it happened.
    if not detach:
        follow_run(ended_run.directory, from_now=True)


def _show_check(run: "mh.Run", check: "ResumeCheck", json: bool) -> None:
    """Print the steps that differ, or all if they are few, and the result; raise an error if anything differs."""
    from mhmoe_ray.runs import metrics
    from mhmoe_ray.train.repetition import COMPARED_METRICS

    if json:
        print_json({"run": run.id, "equal": check.is_equal, **check.model_dump()})
    else:
        rows = [
            [
                f"{step.step:,}",
                *(str(values.get(metrics.LOSS, "missing")) for values in (step.recorded, step.repeated)),
                ", ".join(f"no: {COMPARED_METRICS[name]}" for name in step.different) or "yes",
            ]
            for step in (check.steps if len(check.steps) <= SHOWN_STEPS else check.different_steps[:SHOWN_STEPS])
        ]
        if rows:
            print_table(["step", "recorded loss", "repeated loss", "equal"], rows, names=["equal"])
        for name in check.different_state[:SHOWN_STEPS]:
            print_line(f"{check.end} differs in {name}")
    if error := check.error(run.id):
        raise error
    if not json:
        extent = f"within {check.tolerance:.0%}" if check.tolerance else "to the last bit"
        steps = format_count(len(check.steps), "step")
        print_line(f"{steps} from {check.start or 'the start'} on and {check.end} are equal {extent}")


def stop(
    run: options.RunArg = None,
    end_immediately: Annotated[
        bool, typer.Option("--now", help="End its job at once, without a last checkpoint.")
    ] = False,
    storage: options.StorageOption = options.STORAGE,
) -> None:
    """Ask a run to end: its workers finish their step, validate, save a checkpoint and stop. `resume` continues it.

    A run whose workers are not training yet is ended at once.
    """
    show_activity("asking the run to stop")
    from mhmoe_ray.api.attempts import stop_run
    from mhmoe_ray.runs.directory import find_run

    run_dir = find_run(run, storage, with_job=True)
    if outcome := stop_run(run_dir, end_immediately, print_note):
        reason_text = f": {outcome.reason}" if outcome.reason else ""
        print_line(f"run {run_dir.id} {outcome.state}{reason_text}")


def profile(
    run: options.RunArg = None,
    steps: Annotated[int, typer.Option(help="Number of steps to profile.", min=1, max=100)] = 3,
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Profile the next steps of a run that trains, or show the newest profile of a run that has ended.

    The table has the time of each part of a step, forward and backward: the median over ranks, the slowest rank, and
    what `mhmoe plan` expects. Traces of torch's profiler are in the run directory. Profiled steps are slower.
    """
    show_activity("looking for the run")
    result = mh.find_run(run, storage).profile(steps, print_note)
    if json:
        print_json(result)
        return
    step_seconds, rows = result["parts"]["step"]["median"], []
    for part, seconds in result["parts"].items():
        slowest = f"{1e3 * seconds['slowest']:.1f}"
        planned = "" if seconds["plan"] is None else f"{1e3 * seconds['plan']:.1f}"
        median, share = f"{1e3 * seconds['median']:.1f}", f"{seconds['median'] / step_seconds:.1%}"
        rows.append([part, median, share, slowest, str(seconds["rank"]), planned])
    print_table(["part", "ms", "share", "slowest", "rank", "plan"], rows, names=["part"])
    count = format_count(result["steps"], "step")
    print_line(f"{count} from {result['step']} on, {format_count(result['ranks'], 'rank')}; traces: {result['path']}")
    if result["missing_ranks"]:
        print_note(f"warning: ranks {result['missing_ranks']} have not written their profiles; see `mhmoe logs`")
    if result["unplanned"]:
        print_note(f"the plan expects no times: {result['unplanned']}")


def track(run: options.RunArg = None, storage: options.StorageOption = options.STORAGE) -> None:
    """Send the metrics of a run that has ended to the trackers of its spec, as far as they lack them.

    Workers send metrics while they train; this is for those that a server did not take.
    """
    show_activity("sending metrics")
    from mhmoe_ray.errors import JobError

    tracked_run = mh.find_run(run, storage)
    unsent_counts = tracked_run.track()
    for name, count in unsent_counts.items():
        print_line(f"{name}: " + (f"it did not accept {format_count(count, 'step')}" if count else "it has all steps"))
    if not unsent_counts:
        print_line("the spec of the run names no tracker")
    if any(unsent_counts.values()):
        raise JobError(f"run {tracked_run.id}", "a tracker did not accept all steps", "give the command again later")


def rm(
    runs: Annotated[
        list[str],
        typer.Argument(help="Ids of runs, beginnings of ids, or paths.", autocompletion=options.complete_runs),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove them without asking.")] = False,
    force: options.ForceOption = False,
    storage: options.StorageOption = options.STORAGE,
) -> None:
    """Remove runs that are over or lost their cluster, with their checkpoints. This cannot be undone.

    For example `mhmoe rm tiny-3f tiny-9a`.
    """
    from mhmoe_ray.api.attempts import check_removable
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs.directory import find_run

    # All runs are found and checked before the first one is removed, so that an error removes nothing. A name that is
    # given twice counts once, and so does a run with two names (its id, the beginning of its id, and its path).
    run_dirs = list(dict.fromkeys(find_run(name, storage) for name in runs))
    for run in run_dirs:
        check_removable(run, force)
    names = ", ".join(run.id for run in run_dirs)
    if not yes:
        if not sys.stdin.isatty():
            raise RunError(
                f"runs {names}", "there is no terminal on which you could confirm", "give --yes to remove them"
            )
        if not typer.confirm(f"remove {names}, with all checkpoints?", err=True):
            note.print("nothing was removed")
            return
        # The user's answer may have taken long: a run may have been resumed or served meanwhile.
        for run in run_dirs:
            check_removable(run, force)
    for run in run_dirs:
        run.remove()
        out.print(f"removed {run.id}")
