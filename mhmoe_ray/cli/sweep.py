"""`mhmoe sweep`: many runs that differ in some keys, as one; the plan, the progress, and the final table."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mhmoe_ray.cli import jobs
from mhmoe_ray.cli.common import (
    AddressOption,
    DetachOption,
    SetOption,
    detaching,
    nats,
    note,
    number_table,
    out,
    print_json,
    print_whole,
    say,
)

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.sweeps import Order, SweepDir
    from mhmoe_ray.spec import SweepRun


POLL_SECONDS = 1.0
ASK_SECONDS = 5.0
MOST_RESTARTS = 3


def show_plan(planned: "list[SweepRun]", concurrent: int) -> None:
    """Print every variant with its sizes, and their ratios to the first variant's."""
    from mhmoe_ray.planner.sizes import sizes

    variants = {run.variant: run.spec for run in planned}
    first = sizes(next(iter(variants.values())).model)
    table = []
    for name, spec in variants.items():
        found, moe = sizes(spec.model), spec.model.moe
        shape = [str(moe.heads), str(moe.experts), str(moe.top_k), str(moe.d_expert)] if moe else ["", "", "", ""]
        ratios = [found.parameters / first.parameters, found.macs_per_token / first.macs_per_token]
        tokens = spec.train.steps * spec.tokens_per_step
        table.append([name, *shape, f"{found.parameters:,}", *(f"{r:.3f}" for r in ratios), f"{tokens:,}"])
    columns = ["", "h", "E", "k", "f", "parameters", "ratio", "multiply-adds", "tokens"]
    print_whole(number_table(columns, table))
    seeds = len({run.seed for run in planned})
    out.print(f"{len(variants)} variants x {seeds} seeds = {len(planned)} runs, {concurrent} at a time")


def follow(place: "SweepDir", name: str, connection: "Connection") -> None:
    """Show the progress of an order until the job that starts its runs has ended; restart the job if it was killed.

    Args:
        place: the sweep's directory.
        name: name of the order.
        connection: connection to the cluster.

    Raises:
        MhmoeError: the job ended with an error of its own.
        ClusterError, StorageError: the cluster or the storage no longer answers.
    """
    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.sweep import client

    restarts, asked, told, gone_since, patience = 0, time.monotonic(), False, 0.0, Patience(say)
    hint = "the sweep goes on. The same command follows it again; with --stop it ends it"
    with detaching(hint), _bar() as bar:
        view = _View(place, place.order(name), bar)
        while not patience.ask(view.refresh, False):
            time.sleep(POLL_SECONDS)
            if time.monotonic() - asked < ASK_SECONDS:
                continue
            stands = patience.ask(partial(_stands, place), None)
            if stands is None:
                continue
            newest, order, stopping = stands
            if newest != name and not told:
                note.print("another command asked for runs of this sweep; its job starts these, too")
                told = True
            alive = patience.ask(partial(client.is_alive, order), True)
            asked = time.monotonic()
            if alive:
                gone_since = 0.0
                continue
            if stopping or patience.ask(view.refresh, False):
                return
            gone_since = gone_since or asked
            newer = patience.ask(partial(_stands, place), None)
            if newer and newer[2]:
                return
            if newer is None or newer[0] != newest or (newest != name and asked - gone_since < 2 * ASK_SECONDS):
                continue  # whoever gave that order may follow it, and start it again
            if error := client.own_error(order):
                if newest != name:
                    return
                raise error
            if restarts == MOST_RESTARTS:
                return
            restarts += 1
            note.print("the job that starts the runs has ended; it is started again")
            name = client.again(place, connection, order)


def _stands(place: "SweepDir") -> "tuple[str, Order, bool]":
    """Return the name of the newest order, the order, and whether no more runs are to start."""
    newest = place.orders()[-1]
    return newest, place.order(newest), place.stop_file.exists()


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    return Progress(*columns, console=note, disable=not note.is_terminal)


class _View:
    def __init__(self, place: "SweepDir", order: "Order", bar: Progress) -> None:
        self._place, self._order, self._bar = place, order, bar
        self._entries = order.wanted_entries
        self._whole = bar.add_task("runs", total=len(self._entries), said="")
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}

    def refresh(self) -> bool:
        """Update the bar, and return whether all runs of the order are over."""
        from mhmoe_ray.runs import history, metrics
        from mhmoe_ray.sweep.client import is_to_run, state_of

        runs, over = self._place.runs(), 0
        for entry in self._entries:
            if (run := runs.get(entry.name)) is None:
                continue
            if self._told.get(entry.name) == "finished":  # which it stays
                over += 1
                continue
            state = state_of(run)
            over += not is_to_run(entry.name, run, state, self._order)
            last = history.last(run) if run.metrics_file.exists() else None
            if self._told.get(entry.name) != state:
                self._told[entry.name] = state
                if not note.is_terminal and state != "submitted":
                    figures = f" at step {last[metrics.STEP]}" if last else ""
                    note.print(f"{entry.name}: {state}{figures}")
            self._show(entry.name, state, entry.spec.train.steps, last)
        self._bar.update(self._whole, completed=over)
        return over == len(self._entries)

    def _show(self, name: str, state: str, steps: int, last: dict[str, Any] | None) -> None:
        from mhmoe_ray.runs import events, metrics

        if events.is_over(state):
            if (task := self._tasks.pop(name, None)) is not None:
                self._bar.remove_task(task)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=steps, said="")
        said = f"loss {nats(last[metrics.LOSS])}" if last else state
        self._bar.update(self._tasks[name], completed=last[metrics.STEP] if last else 0, said=said)


def rows(place: "SweepDir") -> list[dict[str, Any]]:
    """Return one row for each variant, for JSON, in the order of the sweep; ratios are relative to the first variant.

    Raises:
        RunError: there is no such sweep.
    """
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.report.variants import table

    if not place.exists:
        raise RunError(f"sweep {place.name}", "it was never started", "start it: the same command without --show")
    return table(place)


def show_rows(table: list[dict[str, Any]]) -> None:
    cells = []
    for row in table:
        spread = f"{row['deviation']:.4f}" if row["deviation"] is not None else ""
        loss = f"{row['loss']:.4f}" if row["loss"] is not None else ""
        perplexity = f"{row['perplexity']:.2f}" if row["perplexity"] is not None else ""
        speed = f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else ""
        states = ", ".join(f"{count} {state}" for state, count in row["states"].items())
        ratios = [f"{row['parameters_ratio']:.3f}", f"{row['macs_ratio']:.3f}"]
        cells.append([row["variant"], *ratios, loss, spread, perplexity, speed, states])
    columns = ["", "parameters", "multiply-adds", "loss", "+-", "perplexity", "tok/s", "runs"]
    print_whole(number_table(columns, cells))
    steps = {row["step"] for row in table if row["step"]}
    if steps:
        told = " and ".join(f"{step:,}" for step in sorted(steps))
        out.print(
            f"validation loss in nats per token at step {told}, mean and deviation over seeds; ratios to the first"
        )


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

    Ctrl-C stops following, not the sweep. The same command again continues it: finished runs stay; runs that failed,
    were stopped or interrupted continue from their checkpoints; runs that were added to the file since are started. For
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
    """Return the runs of these variants; all runs if no variants are given.

    Raises:
        SpecError: the sweep has no variant of that name.
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
    """Check everything that can be checked now, and submit the job that starts the runs.

    Returns:
        The name of the order, and the connection to the cluster.
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
        jobs.check_can_train(spec)
    client.check_same(place, wanted)
    cpus = max(spec.cluster.cpus for spec in specs) * concurrent
    needed = [specs[0].storage, *{spec.data.prepared for spec in specs}]
    for spec in specs:
        jobs.check_gpus_of_this_machine(spec, address)
    connection = jobs.cluster_for(specs[0].cluster, needed, cpus, address)
    for spec in specs:
        jobs.check_room(spec, connection)
    again = len({run.name for run in wanted} & place.runs().keys())
    told = f"; {again} of them were started before" if again else ""
    note.print(f"sweep {place.name}: {len(wanted)} runs, {concurrent} at a time{told}", soft_wrap=True)
    names = [run.name for run in wanted]
    return client.submit(place, connection, planned, names, size=size, concurrent=concurrent), connection


def _say_failures(place: "SweepDir", wanted: list[str]) -> None:
    """Raise an error if runs failed or were left over.

    Raises:
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
