"""`mhmoe data mix`: how much training reads of each domain, computed from a spec and the counts of its prepared data.

No text is read and nothing is started. The plot shows the shares of domains in each phase of the training on a
logarithmic scale, and their epochs in the whole training.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mhmoe_ray as mh
from mhmoe_ray.cli import options
from mhmoe_ray.cli.output import out, print_json, print_line, print_table
from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.plotting import COLOURS, ROW_INCHES, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.spec import RunSpec


STAGES = {"by_size": ("by size", "o"), "tempered": ("tempered", "s"), "share": ("after limits", "x")}
"""Label and marker in the plot for each kind of share, by its key in the mixture."""


def _mixture_figure(mixture: dict[str, Any]) -> "Figure":
    """Return a figure with a panel of shares for each phase, and one of epochs with marks at their limits."""
    names, phases = list(mixture["whole"]["domains"]), mixture["phases"]
    rows = range(len(names))
    figure = new_figure(4 + 3.5 * (len(phases) + 1), 1.5 + ROW_INCHES * len(names))
    axes = figure.subplots(1, len(phases) + 1, sharey=True)
    # The last axis is for the epochs of the whole training.
    for axis, phase in zip(axes, phases, strict=False):
        for (stage, (label, marker)), color in zip(STAGES.items(), COLOURS, strict=False):
            share = [phase["domains"][name][stage] for name in names]
            # A logarithmic scale has no place for a share of 0, so such a share is not drawn.
            shown_rows = [i for i in rows if share[i]]
            percents = [100 * share[i] for i in shown_rows]
            axis.plot(percents, shown_rows, marker, label=label, color=color, fillstyle="none", markersize=7)
        axis.set_xscale("log")
        axis.set_title(f"from step {phase['from_step']:,}: share in per cent")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    bar_starts = [0.0] * len(names)
    for number, phase in enumerate(phases):
        epochs = [phase["domains"][name]["epochs"] for name in names]
        # The bars do not use the first colour, black, because the marks of the limits are black.
        color = COLOURS[1 + number % (len(COLOURS) - 1)]
        axes[-1].barh(rows, epochs, left=bar_starts, label=f"from step {phase['from_step']:,}", color=color)
        bar_starts = [a + b for a, b in zip(bar_starts, epochs, strict=True)]
    limits = {i: mixture["whole"]["domains"][name]["samples_at_most"] for i, name in enumerate(names)}
    limited = [i for i in rows if limits[i] is not None]
    epoch_limits = [limits[i] / mixture["whole"]["domains"][names[i]]["samples_there"] for i in limited]
    axes[-1].plot(epoch_limits, limited, "k|", markersize=10, label="at most")
    axes[-1].set_title("epochs of the whole training")
    axes[-1].grid(axis="x", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    epoch_handles, epoch_labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles + epoch_handles, labels + epoch_labels, loc="outside upper center", ncols=6)
    return figure


def mix(
    spec: options.SpecArg,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    json: options.JsonOption = False,
    png: Annotated[Path | None, typer.Option(help="Also draw the mixture into this file.")] = None,
) -> None:
    """Show what a training reads of each source, domain and language: shares, samples, epochs and tokens by phase.

    Shares "by size" follow the sources' weights and the number of tokens; "tempered" shares also depend on alpha;
    "limited" shares depend on max_epochs too. Numbers of samples are exact, as the training order itself counts them.
    Numbers of tokens exclude padding; where samples are padded, the domain's mean number of tokens per sample is used.
    For a run that continues the order of another run, "read before" is the number of samples that the other run has
    read; this run reads the samples after them. The data must be prepared.
    """
    from mhmoe_ray.data.shards.recipe import require_prepared_data

    resolved = mh.load_spec(spec, set_)
    mixture = mixture_dict(resolved, require_prepared_data(resolved))
    if png:
        with style():
            save(_mixture_figure(mixture), png)
    if json:
        print_json(mixture)
        return
    _print_mixture(mixture)
    if png:
        print_line(f"drawn in {png}")


def mixture_dict(spec: "RunSpec", manifest: "DataManifest") -> dict[str, Any]:
    """Return what a training reads as JSON data: by phase and in total, each with rows by domain and by source."""
    from mhmoe_ray.checkpoint.start.record import plan_start
    from mhmoe_ray.data.order.mixture import compute_mixture

    record = plan_start(spec)
    mixture = compute_mixture(spec, manifest, record.samples_before if record else None)
    names, sources = [d.name for d in mixture.domains], [d.source for d in mixture.domains]
    sample_counts = [d.samples for d in mixture.domains]
    # Padding does not count as tokens, so a sample may have fewer tokens than its length.
    mean_tokens = [
        spec.data.seq_len - manifest.domains[name].padding / n for name, n in zip(names, sample_counts, strict=True)
    ]

    def sum_rows(values: Mapping[str, Sequence[float]], keys: Sequence[str]) -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {key: dict.fromkeys(values, 0) for key in keys}
        for i, key in enumerate(keys):
            for name, value in values.items():
                result[key][name] += value[i]
        for row in result.values():
            row |= {"tokens": round(row["tokens"]), "epochs": row["samples"] / row["samples_there"]}
        return result

    def rows_by_kind(shares: Mapping[str, Sequence[float]], samples_read: Sequence[int]) -> dict[str, Any]:
        tokens = [n * t for n, t in zip(samples_read, mean_tokens, strict=True)]
        values = {**shares, "samples": samples_read, "samples_there": sample_counts, "tokens": tokens}
        return {"domains": sum_rows(values, names), "sources": sum_rows(values, sources)}

    phases = []
    for phase in mixture.phases:
        samples_read = mixture.samples_read(phase.from_step, phase.from_step + phase.steps)
        shares = {"by_size": phase.by_size, "tempered": phase.tempered, "share": phase.shares}
        phases.append({"from_step": phase.from_step, "steps": phase.steps, **rows_by_kind(shares, samples_read)})
    steps = spec.train.steps
    samples_read = mixture.samples_read(0, steps)
    share = [n / (steps * spec.samples_per_step) for n in samples_read]
    totals = rows_by_kind(
        {"share": share, "tokens_there": [manifest.domains[name].tokens for name in names]}, samples_read
    )
    for name, limit, read_count in zip(names, mixture.limits, mixture.samples_before, strict=True):
        totals["domains"][name]["samples_at_most"] = limit
        if any(mixture.samples_before):
            totals["domains"][name]["samples_before"] = read_count
    return {
        "name": spec.name,
        "steps": steps,
        "samples_per_step": spec.samples_per_step,
        "seq_len": spec.data.seq_len,
        "phases": phases,
        "whole": totals,
    }


def _print_mixture(mixture: dict[str, Any]) -> None:
    samples = mixture["steps"] * mixture["samples_per_step"]
    tokens = sum(row["tokens"] for row in mixture["whole"]["sources"].values())
    print_line(
        f"{mixture['name']}: {mixture['steps']:,} steps of {mixture['samples_per_step']:,} samples: "
        f"{samples:,} samples, {tokens:,} tokens"
    )
    # The shares of a single phase are those of the whole training below.
    has_several_phases = len(mixture["phases"]) > 1
    for phase in mixture["phases"] if has_several_phases else []:
        out.print(f"\nfrom step {phase['from_step']:,}, {phase['steps']:,} steps, shares in per cent", style="bold")
        columns = ["", "by size", "tempered", "limited", "samples", "epochs", "tokens"]
        print_table(columns, [[name, *_share_cells(r), *_read_cells(r)] for name, r in _rows_by_source(phase)])
    out.print("\nthe whole training" + ("" if has_several_phases else ", shares in per cent"), style="bold")
    share_columns = ["share"] if has_several_phases else ["by size", "tempered", "limited"]
    is_continued = any("samples_before" in row for row in mixture["whole"]["domains"].values())
    before_column = ["read before"] if is_continued else []
    columns = ["", "prepared tokens", "prepared samples", *share_columns, *before_column]
    columns += ["samples", "epochs", "at most", "tokens"]
    lines = []
    for name, row in _rows_by_source(mixture["whole"]):
        kind = "sources" if name in mixture["whole"]["sources"] else "domains"
        phase_row = mixture["phases"][0][kind][row["key"]]
        share_cells = [_format_percent(row["share"])] if has_several_phases else _share_cells(phase_row)
        samples_cell, epochs, tokens = _read_cells(row)
        limit = row.get("samples_at_most")
        limit_cell = "" if limit is None else _format_epochs(limit / row["samples_there"])
        existing_cells = f"{row['tokens_there']:,}", f"{row['samples_there']:,}"
        before_cell = [f"{row['samples_before']:,}" if "samples_before" in row else ""] if is_continued else []
        lines.append([name, *existing_cells, *share_cells, *before_cell, samples_cell, epochs, limit_cell, tokens])
    print_table(columns, lines)


def _rows_by_source(table: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield each source with its row, then its domains, indented. The entry `key` of a row has the full name."""
    for source, total in table["sources"].items():
        yield source, {**total, "key": source}
        for name, row in table["domains"].items():
            if source_of(name) == source:
                yield f"  {subfolder_of(name)}", {**row, "key": name}


def _share_cells(row: dict[str, float]) -> list[str]:
    return [_format_percent(row[column]) for column in ("by_size", "tempered", "share")]


def _read_cells(row: dict[str, float]) -> tuple[str, str, str]:
    return f"{row['samples']:,}", _format_epochs(row["epochs"]), f"{row['tokens']:,}"


def _format_percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _format_epochs(epochs: float) -> str:
    # Below 0.1, two decimals could show 0.00 for a domain that is read a little, so one significant digit is shown.
    return f"{epochs:.2f}" if epochs >= 0.1 or not epochs else f"{epochs:.1g}"
