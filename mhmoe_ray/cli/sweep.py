"""`mhmoe sweep`: many runs that differ in some keys, as one."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import launch
from mhmoe_ray.cli.common import AddressOption, DetachOption, SetOption, note, print_json
from mhmoe_ray.cli.sweep_view import follow, rows, show_plan, show_rows

POLL_SECONDS = 0.5

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.sweeps import Definition, SweepDir
    from mhmoe_ray.spec import SweepRun


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep, for example jobs/paper/heads.yaml.", show_default=False)],
    size: Annotated[str | None, typer.Option(help="One of the sizes that it knows; its first by default.")] = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    concurrent: Annotated[int | None, typer.Option(min=1, help="Runs at a time, instead of the file's number.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the file's, for example 0,1,2.")] = None,
    only: Annotated[str | None, typer.Option(help="Of its variants these alone, for example smoe,mhmoe-h2.")] = None,
    address: AddressOption = None,
    detach: DetachOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; start nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show how its runs stand; start nothing.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Start no more runs, and stop those that run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Run all variants of a sweep, each with every seed, and show them in one table.

    Ctrl-C stops following, not the sweep. The same command again goes on with it: finished runs stay, interrupted ones
    go on from their checkpoints, and runs that the file has got since are added. For example `mhmoe sweep
    jobs/paper/heads.yaml --size small --seeds 0,1`.
    """
    from mhmoe_ray.planner.sweep import planned_runs
    from mhmoe_ray.runs.sweeps import sweep_dir
    from mhmoe_ray.spec import load_sweep

    own = ([f"concurrent={concurrent}"] if concurrent else []) + ([f"seeds=[{seeds}]"] if seeds else [])
    known = load_sweep(file, own)
    size = size or next(iter(known.sizes))
    planned = [
        run.model_copy(update={"spec": run.spec.with_absolute_paths(Path.cwd())})
        for run in planned_runs(known, file.parent, size, set_)
    ]
    if only:
        planned = _only(planned, only.split(","), known.name)
    place = sweep_dir(planned[0].spec.storage, f"{known.name}-{size}")
    if dry_run:
        show_plan(planned, known.concurrent)
        return
    started = not (stop or show)
    if stop:
        _stop(place)
    elif started:
        connection = _start(place, planned, size, known.concurrent, address)
        if detach:
            note.print(f"see it with `mhmoe sweep {file} --size {size} --show`", soft_wrap=True)
            return
        if not follow(place, lambda: _is_alive(place), lambda: _submit(place, connection)):
            return
    table = rows(place)
    if json:
        print_json(table)
    else:
        show_rows(table)
    if started:
        _say_failures(place)


def _only(planned: "list[SweepRun]", wanted: list[str], name: str) -> "list[SweepRun]":
    """Raises:
    SpecError: a name is none of its variants.
    """
    from mhmoe_ray.errors import SpecError

    known = dict.fromkeys(run.variant for run in planned)
    if unknown := [name for name in wanted if name not in known]:
        raise SpecError(f"sweep {name}", f"it has no variant {unknown[0]!r}", f"choose from {', '.join(known)}")
    return [run for run in planned if run.variant in wanted]


def _start(
    place: "SweepDir", planned: "list[SweepRun]", size: str, concurrent: int, address: str | None
) -> "Connection":
    """Its job, unless that runs already.

    Raises:
        SpecError: a run that was started has another spec now.
    """
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.runs.sweeps import Definition

    before = place.definition() if place.exists else None
    _check_same(place, planned, before)
    alive = before is not None and _is_alive(place)
    if before and alive and _all_over(place):
        note.print("its job is about to end; waiting for that")
        while alive := _is_alive(place):
            time.sleep(POLL_SECONDS)
    specs = [run.spec for run in planned]
    cpus = max(spec.cluster.cpus for spec in specs) * concurrent
    needed = [specs[0].storage, *{spec.data.prepared for spec in specs}]
    if before and alive:
        connection = connect(before.jobs[-1].address)
    else:
        connection = launch.cluster_for(specs[0].cluster, needed, cpus, address)
    started, now = place.runs(), {run.name for run in planned}
    others = [run for run in (before.entries if before else []) if run.name in started and run.name not in now]
    jobs, entries = before.jobs if before else [], [*planned, *others]
    place.stop_file.unlink(missing_ok=True)
    # The job looks at this again and again, so that runs can be added to a sweep that runs.
    place.define(Definition(size=size, concurrent=concurrent, entries=entries, jobs=jobs))
    told = f"; {len(started)} of them were started before" if started else ""
    doing = " runs already" if alive else ""
    note.print(f"sweep {place.name}{doing}: {len(entries)} runs, {concurrent} at a time{told}", soft_wrap=True)
    if not alive:
        _submit(place, connection)
    return connection


def _all_over(place: "SweepDir") -> bool:
    """Whether there is nothing left for its job to do."""
    from mhmoe_ray.runs import events

    runs = place.runs()
    return all(
        entry.name in runs and events.is_over(events.state(events.events(runs[entry.name])))
        for entry in place.definition().entries
    )


def _submit(place: "SweepDir", connection: "Connection") -> None:
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.runs.sweeps import SweepJob

    definition = place.definition()
    spec = definition.entries[0].spec
    name = f"sweep-{place.name}-{int(time.time())}-{len(definition.jobs) + 1}"
    job = SweepJob(job=name, address=connection.address, local=connection.local, submitted=time.time())
    place.define(definition.model_copy(update={"jobs": [*definition.jobs, job]}))
    args = ["-m", "mhmoe_ray.cluster.sweeping", str(place.path)]
    request = jobs.request(args, name, local=connection.local, runtime_env=spec.cluster.runtime_env)
    jobs.submit(connection, request)


def _check_same(place: "SweepDir", planned: "list[SweepRun]", before: "Definition | None") -> None:
    from mhmoe_ray.errors import SpecError

    now = {run.name: run.spec for run in planned}
    free = {"cluster", "serve"}
    started = place.runs()
    for entry in before.entries if before else []:
        if entry.name not in started or entry.name not in now:
            continue
        was, is_ = (spec.model_dump(mode="json", exclude=free) for spec in (entry.spec, now[entry.name]))
        if other := [key for key in is_ if is_[key] != was[key]]:
            why = f"run {entry.name} was started with another spec: {', '.join(other)}"
            fix = f"give the sweep another name, or remove {place.path} to begin anew"
            raise SpecError(f"sweep {place.name}", why, fix)


def _is_alive(place: "SweepDir") -> bool:
    """Whether the job that starts its runs goes on."""
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.errors import ClusterError

    submitted = place.definition().jobs
    if not submitted:
        return False
    try:
        status = jobs.status(connect(submitted[-1].address), submitted[-1].job)
    except ClusterError:  # what it ran is looked at run by run
        return False
    return status in ("PENDING", "RUNNING")


def _stop(place: "SweepDir") -> None:
    """Raises:
    RunError: there is no such sweep.
    """
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.runs import events

    if not place.exists:
        raise RunError(f"sweep {place.name}", "it was never started", "start it without --stop")
    place.stop_file.touch()  # first: whoever follows it would start the job again
    if _is_alive(place):
        last = place.definition().jobs[-1]
        jobs.stop(connect(last.address), last.job)
    for name, run in place.runs().items():
        if not events.is_over(events.state(events.events(run))):
            run.stop_file.touch()
            note.print(f"{name}: stopping after a checkpoint")


def _say_failures(place: "SweepDir") -> None:
    """Raises:
    JobError: a run of it failed.
    """
    from mhmoe_ray.errors import JobError
    from mhmoe_ray.runs import events

    failed = [n for n, run in place.runs().items() if events.state(events.events(run)) == "failed"]
    if failed:
        ids = place.runs()
        why = f"{', '.join(failed)} failed"
        fix = f"see `mhmoe status {ids[failed[0]].id}`; the same command again goes on with it"
        raise JobError(f"sweep {place.name}", why, fix)
