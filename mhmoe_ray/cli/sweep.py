"""`mhmoe sweep`: start many runs whose specs differ in some keys, and show their plan and final table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.formats import format_figure
from mhmoe_ray.cli.output import note, out, print_json, print_note, print_table, show_activity
from mhmoe_ray.cli.sweep_follow import follow_order

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.sweeps import SweepDir
    from mhmoe_ray.spec import SweepRun


def print_plan(planned_runs: "list[SweepRun]", concurrent: int) -> None:
    """Print a table of a sweep's variants, with sizes and ratios to the first one."""
    from mhmoe_ray.planner.sizes import compute_sizes

    # The runs of a variant differ only in their seed, which does not change sizes.
    variants = {run.variant: run.spec for run in planned_runs}
    first_sizes = compute_sizes(next(iter(variants.values())).model)
    rows = []
    for name, spec in variants.items():
        model_sizes, moe = compute_sizes(spec.model), spec.model.moe
        shape = [str(moe.heads), str(moe.experts), str(moe.top_k), str(moe.d_expert)] if moe else ["", "", "", ""]
        ratios = [
            model_sizes.parameters / first_sizes.parameters,
            model_sizes.macs_per_token / first_sizes.macs_per_token,
        ]
        tokens = spec.train.steps * spec.tokens_per_step
        rows.append([name, *shape, f"{model_sizes.parameters:,}", *(f"{r:.3f}" for r in ratios), f"{tokens:,}"])
    columns = ["", "h", "E", "k", "f", "parameters", "ratio", "multiply-adds", "tokens"]
    print_table(columns, rows)
    seed_count = len({run.seed for run in planned_runs})
    out.print(f"{len(variants)} variants x {seed_count} seeds = {len(planned_runs)} runs, {concurrent} at a time")


def variant_rows(directory: "SweepDir") -> list[dict[str, Any]]:
    """Return the results of each variant as `mhmoe sweep --json` prints them, with ratios to the first one."""
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.report.variants import sweep_table

    if not directory.exists:
        raise RunError(f"sweep {directory.name}", "it was never started", "start it: the same command without --show")
    return sweep_table(directory)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `variant_rows` as a table."""
    part_names = [*dict.fromkeys(name for row in rows for name in row["part_losses"])]
    cells = []
    for row in rows:
        scores = [
            format_figure(row[key], form, "")
            for key, form in (("loss", ".4f"), ("deviation", ".4f"), ("perplexity", ".2f"))
        ]
        speed = f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else ""
        states = ", ".join(f"{count} {state}" for state, count in row["states"].items())
        ratios = [f"{row['parameters_ratio']:.3f}", f"{row['macs_ratio']:.3f}"]
        parts = [format_figure(row["part_losses"].get(name), ".4f", "") for name in part_names]
        cells.append([row["variant"], *ratios, *scores, *parts, speed, states])
    columns = ["", "parameters", "multiply-adds", "loss", "+-", "perplexity", *part_names, "tok/s", "runs"]
    print_table(columns, cells)
    steps = {row["step"] for row in rows if row["step"]}
    if steps:
        step_text = " and ".join(f"{step:,}" for step in sorted(steps))
        unit = "summed over all parts" if part_names else "in nats per token"
        out.print(f"validation loss {unit} at step {step_text}, mean and deviation over seeds; ratios to the first")


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep, for example jobs/paper/heads.yaml.", show_default=False)],
    size: Annotated[str | None, typer.Option(help="One of the sizes in the file; the first by default.")] = None,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    storage: options.SpecStorageOption = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Runs at a time, instead of the file's number.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the file's, for example 0,1,2.")] = None,
    variant_names: Annotated[
        str | None, typer.Option("--only", help="Run only these variants, for example smoe,mhmoe-h2.")
    ] = None,
    address: options.AddressOption = None,
    detach: options.DetachOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; start nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show the state of its runs; start nothing.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Start no more runs, and stop those that run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Run all variants of a sweep, each with every seed, and show them in one table.

    Ctrl-C stops following, not the sweep. The same command again continues the sweep: finished runs stay; runs that
    failed, were stopped or interrupted continue from their checkpoints; runs that are new in the file start. For
    example `mhmoe sweep jobs/paper/heads.yaml --size small --seeds 0,1`.
    """
    show_activity("checking the specs and their data")
    from mhmoe_ray.runs.sweeps import sweep_dir
    from mhmoe_ray.spec import load_sweep
    from mhmoe_ray.sweep import client
    from mhmoe_ray.sweep.plan import planned_runs

    if json and detach:
        raise typer.BadParameter("--json prints the table of a sweep that is followed: leave out --detach")
    overrides = ([f"concurrent={concurrent}"] if concurrent else []) + ([f"seeds=[{seeds}]"] if seeds else [])
    sweep_spec = load_sweep(file, overrides)
    size = size or next(iter(sweep_spec.sizes))
    all_runs = [
        run.model_copy(update={"spec": run.spec.with_absolute_paths(Path.cwd())})
        for run in planned_runs(sweep_spec, file.parent, size, options.with_storage(set_, storage))
    ]
    selected_runs = _runs_of_variants(all_runs, variant_names.split(",") if variant_names else None, sweep_spec.name)
    directory = sweep_dir(all_runs[0].spec.storage, f"{sweep_spec.name}-{size}")
    if dry_run:
        if json:
            print_json([{"run": run.name, "spec": run.spec.model_dump(mode="json")} for run in selected_runs])
        else:
            print_plan(selected_runs, sweep_spec.concurrent)
        return
    if stop:
        states, errors = client.stop(directory)
        for name, state in states.items():
            note.print(f"{name}: {'stopping after a checkpoint' if state == 'running' else 'ended before it trained'}")
        for error in errors:
            print_note(f"warning: {error}; its runs learn from their directories that they must stop")
    elif not show:
        order, connection = _submit_order(directory, all_runs, selected_runs, size, sweep_spec.concurrent, address)
        if detach:
            print_note(f"see it with `mhmoe sweep {file} --size {size} --show`")
            return
        follow_order(directory, order, connection)
    table = variant_rows(directory)
    if json:
        print_json(table)
    else:
        print_rows(table)
    if not stop and not show:
        _raise_failures(directory, [run.name for run in selected_runs])


def _runs_of_variants(runs: "list[SweepRun]", variants: list[str] | None, name: str) -> "list[SweepRun]":
    """Return the runs of some variants of a sweep, or all; an unknown variant is a SpecError."""
    from mhmoe_ray.errors import SpecError

    variant_names = dict.fromkeys(run.variant for run in runs)
    if unknown_variants := [variant for variant in variants or [] if variant not in variant_names]:
        raise SpecError(
            f"sweep {name}", f"it has no variant {unknown_variants[0]!r}", f"choose from {', '.join(variant_names)}"
        )
    return [run for run in runs if variants is None or run.variant in variants]


def _submit_order(
    directory: "SweepDir",
    all_runs: "list[SweepRun]",
    selected_runs: "list[SweepRun]",
    size: str,
    concurrent: int,
    address: str | None,
) -> "tuple[str, Connection]":
    """Check the data and the cluster for the selected runs, and submit the job that starts them.

    The order, a record of this request in the sweep's directory, is returned by name, with the connection. Runs that
    need one folder prepared in different ways, or a started run whose spec has changed, are a SpecError.
    """
    from mhmoe_ray.api import connection as checks
    from mhmoe_ray.data.shards.recipe import prepared_key
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.sweep import client

    specs = [run.spec for run in selected_runs]
    # Most runs of a sweep share their prepared data. One check for each way of preparing data is enough.
    spec_by_preparation = {prepared_key(spec): spec for spec in specs}
    folders = [folder for folder, _ in spec_by_preparation]
    if shared_folder := next((folder for folder in folders if folders.count(folder) > 1), None):
        reason = f"its runs need {shared_folder} prepared in different ways"
        raise SpecError(f"sweep {directory.name}", reason, "give each way of preparing its own data.prepared")
    for spec in spec_by_preparation.values():
        checks.check_training(spec)
    client.check_unchanged_specs(directory, selected_runs)
    # A local cluster must hold `concurrent` runs at a time, even if all of them are as large as the largest run.
    cpus = max(spec.cluster.cpus for spec in specs) * concurrent
    locations = [specs[0].storage, *{spec.data.prepared for spec in specs}]
    # A local cluster would be of no use with too few GPUs on this machine, so GPUs are checked before it is started.
    for spec in specs:
        checks.check_gpus_of_this_machine(checks.WorkerDemand.of_training(spec), spec.cluster.cpus, address)
    connection = checks.connect_to_cluster(specs[0].cluster, locations, cpus, address, print_note)
    for spec in specs:
        checks.check_capacity(checks.WorkerDemand.of_training(spec), connection, print_note)
    restarted_count = len({run.name for run in selected_runs} & directory.runs().keys())
    remark = f"; {restarted_count} of them were started before" if restarted_count else ""
    print_note(f"sweep {directory.name}: {len(selected_runs)} runs, {concurrent} at a time{remark}")
    names = [run.name for run in selected_runs]
    return client.submit(directory, connection, all_runs, names, size=size, concurrent=concurrent), connection


def _raise_failures(directory: "SweepDir", names: list[str]) -> None:
    """Raise a JobError if one of these runs failed, or is not over although no job runs it any more."""
    from mhmoe_ray.errors import JobError
    from mhmoe_ray.runs import events

    runs = directory.runs()
    # A run without a directory was never started, so it counts as queued.
    states = {name: events.state(events.read(runs[name])) if name in runs else "queued" for name in names}
    if failed_names := [name for name, state in states.items() if state == "failed"]:
        fix = f"see `mhmoe status {runs[failed_names[0]].id}`; the same command again resumes it"
        raise JobError(f"sweep {directory.name}", f"{', '.join(failed_names)} failed", fix)
    unfinished_names = [name for name, state in states.items() if not events.is_end_state(state)]
    if unfinished_names and not directory.stop_file.exists():
        fix = "the same command again continues it"
        raise JobError(f"sweep {directory.name}", f"it ended with unfinished runs: {', '.join(unfinished_names)}", fix)
