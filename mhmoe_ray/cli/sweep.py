"""`mhmoe sweep`: many runs that differ in some keys, as one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import connecting
from mhmoe_ray.cli.common import AddressOption, DetachOption, SetOption, note, print_json
from mhmoe_ray.cli.sweep_view import follow, rows, show_plan, show_rows

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.sweeps import SweepDir
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
    stop: Annotated[bool, typer.Option("--stop", help="Start no more runs, and stop all that run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Run all variants of a sweep, each with every seed, and show them in one table.

    Ctrl-C stops following, not the sweep. The same command again goes on with it: finished runs stay; those that
    failed, were stopped or interrupted go on from their checkpoints; runs that the file has got since are added. For
    example `mhmoe sweep jobs/paper/heads.yaml --size small --seeds 0,1`.
    """
    from mhmoe_ray.runs.sweeps import sweep_dir
    from mhmoe_ray.spec import load_sweep
    from mhmoe_ray.sweep import client
    from mhmoe_ray.sweep.plan import planned_runs

    if json and detach:
        raise typer.BadParameter("--json prints the table of a sweep that is followed: leave out --detach")
    own = ([f"concurrent={concurrent}"] if concurrent else []) + ([f"seeds=[{seeds}]"] if seeds else [])
    known = load_sweep(file, own)
    size = size or next(iter(known.sizes))
    planned = [
        run.model_copy(update={"spec": run.spec.with_absolute_paths(Path.cwd())})
        for run in planned_runs(known, file.parent, size, set_)
    ]
    wanted = _wanted(planned, only.split(",") if only else None, known.name)
    place = sweep_dir(planned[0].spec.storage, f"{known.name}-{size}")
    if dry_run:
        if json:
            print_json([{"run": run.name, "spec": run.spec.model_dump(mode="json")} for run in wanted])
        else:
            show_plan(wanted, known.concurrent)
        return
    if stop:
        stopping, unasked = client.stop(place)
        for name, state in stopping.items():
            note.print(f"{name}: {'stopping after a checkpoint' if state == 'running' else 'ended before it trained'}")
        for error in unasked:
            note.print(f"warning: {error}; its runs see in their directories that they are to stop", soft_wrap=True)
    elif not show:
        order, connection = _start(place, planned, wanted, size, known.concurrent, address)
        if detach:
            note.print(f"see it with `mhmoe sweep {file} --size {size} --show`", soft_wrap=True)
            return
        follow(place, order, connection)
    table = rows(place)
    if json:
        print_json(table)
    else:
        show_rows(table)
    if not stop and not show:
        _say_failures(place, [run.name for run in wanted])


def _wanted(planned: "list[SweepRun]", variants: list[str] | None, name: str) -> "list[SweepRun]":
    """Those of these variants; all without any.

    Raises:
        SpecError: a name is none of the sweep's variants.
    """
    from mhmoe_ray.errors import SpecError

    known = dict.fromkeys(run.variant for run in planned)
    if unknown := [variant for variant in variants or [] if variant not in known]:
        raise SpecError(f"sweep {name}", f"it has no variant {unknown[0]!r}", f"choose from {', '.join(known)}")
    return [run for run in planned if variants is None or run.variant in variants]


def _start(
    place: "SweepDir",
    planned: "list[SweepRun]",
    wanted: "list[SweepRun]",
    size: str,
    concurrent: int,
    address: str | None,
) -> "tuple[str, Connection]":
    """Check all that can be checked now, and submit the job that starts runs.

    Returns:
        The name of the order; and the cluster.
    """
    from mhmoe_ray.data.shards.manifest import prepared_as
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.sweep import client

    specs = [run.spec for run in wanted]
    texts = {prepared_as(spec): spec for spec in specs}
    folders = [folder for folder, _ in texts]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        why = f"its runs want {twice} prepared in different ways"
        raise SpecError(f"sweep {place.name}", why, "give each of them a data.prepared of its own")
    for spec in texts.values():
        connecting.check_can_train(spec)
    client.check_same(place, wanted)
    cpus = max(spec.cluster.cpus for spec in specs) * concurrent
    needed = [specs[0].storage, *{spec.data.prepared for spec in specs}]
    connection = connecting.cluster_for(specs[0].cluster, needed, cpus, address)
    again = len({run.name for run in wanted} & place.runs().keys())
    told = f"; {again} of them were started before" if again else ""
    note.print(f"sweep {place.name}: {len(wanted)} runs, {concurrent} at a time{told}", soft_wrap=True)
    names = [run.name for run in wanted]
    return client.submit(place, connection, planned, names, size=size, concurrent=concurrent), connection


def _say_failures(place: "SweepDir", wanted: list[str]) -> None:
    """Raises:
    JobError: one of these runs failed, or is not over although nothing runs it.
    """
    from mhmoe_ray.errors import JobError
    from mhmoe_ray.runs import events

    runs = place.runs()
    states = {name: events.state(events.events(runs[name])) if name in runs else "queued" for name in wanted}
    if failed := [name for name, state in states.items() if state == "failed"]:
        fix = f"see `mhmoe status {runs[failed[0]].id}`; the same command again goes on with it"
        raise JobError(f"sweep {place.name}", f"{', '.join(failed)} failed", fix)
    left = [name for name, state in states.items() if not events.is_over(state)]
    if left and not place.stop_file.exists():
        fix = "the same command again goes on with it"
        raise JobError(f"sweep {place.name}", f"it ended without {', '.join(left)}", fix)
