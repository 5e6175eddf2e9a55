"""`mhmoe data mix`: the mixture that a spec will produce, computed from the counts of its prepared data.

No text is read and nothing is started. The picture shows shares by phase on a logarithmic scale, and epochs of the
whole training.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli.common import JsonOption, SetOption, SpecArg, number_table, out, print_json, print_whole, read_spec
from mhmoe_ray.data.domains import source_of, subfolder_of
from mhmoe_ray.pictures import COLOURS, ROW_INCHES, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.spec import RunSpec


STAGES = {"by_size": ("by size", "o"), "tempered": ("tempered", "s"), "share": ("after limits", "x")}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a mixture.

    Args:
        found: the mixture, as `mhmoe data mix --json` prints it.
        path: path of the PNG file to write.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    with style():
        save(_picture(found), path)


def _picture(found: dict[str, Any]) -> "Figure":
    names, phases = list(found["whole"]["domains"]), found["phases"]
    rows = range(len(names))
    figure = new_figure(4 + 3.5 * (len(phases) + 1), 1.5 + ROW_INCHES * len(names))
    axes = figure.subplots(1, len(phases) + 1, sharey=True)
    for axis, phase in zip(axes, phases, strict=False):
        for (stage, (label, marker)), color in zip(STAGES.items(), COLOURS, strict=False):
            share = [phase["domains"][name][stage] for name in names]
            shown = [i for i in rows if share[i]]
            x, look = [100 * share[i] for i in shown], {"color": color, "fillstyle": "none", "markersize": 7}
            axis.plot(x, shown, marker, label=label, **look)
        axis.set_xscale("log")
        axis.set_title(f"from step {phase['from_step']:,}: share in per cent")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    left = [0.0] * len(names)
    for number, phase in enumerate(phases):
        epochs = [phase["domains"][name]["epochs"] for name in names]
        color = COLOURS[1 + number % (len(COLOURS) - 1)]  # black is for the limits
        axes[-1].barh(rows, epochs, left=left, label=f"from step {phase['from_step']:,}", color=color)
        left = [a + b for a, b in zip(left, epochs, strict=True)]
    limits = {i: found["whole"]["domains"][name]["samples_at_most"] for i, name in enumerate(names)}
    limited = [i for i in rows if limits[i] is not None]
    at_most = [limits[i] / found["whole"]["domains"][names[i]]["samples_there"] for i in limited]
    axes[-1].plot(at_most, limited, "k|", markersize=10, label="at most")
    axes[-1].set_title("epochs of the whole training")
    axes[-1].grid(axis="x", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    more_handles, more_labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles + more_handles, labels + more_labels, loc="outside upper center", ncols=6)
    return figure


def mix(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    json: JsonOption = False,
    png: Annotated[Path | None, typer.Option(help="Also draw it into this file.")] = None,
) -> None:
    """Show what a training reads of each source, domain and language: shares, samples, epochs and tokens by phase.

    Shares "by size" follow the sources' weights and the number of tokens; "tempered" shares are after alpha; the last
    ones after max_epochs. Numbers of samples are exact, counted by the training order itself; tokens are without
    padding, and an average where samples are padded. Needs prepared data.
    """
    from mhmoe_ray.data.shards.manifest import prepared_for

    resolved = read_spec(spec, set_)
    found = as_dict(resolved, prepared_for(resolved))
    if png:
        draw(found, png)
    if json:
        print_json(found)
        return
    _show(found)
    if png:
        out.print(f"drawn in {png}", soft_wrap=True)


def as_dict(spec: "RunSpec", manifest: "DataManifest") -> dict[str, Any]:
    """Return the mixture by phase and as a whole; each has rows by domain and by source."""
    from mhmoe_ray.data.order.mixture import mixture

    mixed = mixture(spec, manifest)
    names, sources = [d.name for d in mixed.domains], [d.source for d in mixed.domains]
    there = [d.samples for d in mixed.domains]
    # Of a sample, on average: padding is not read.
    targets = [spec.data.seq_len - manifest.domains[name].padding / n for name, n in zip(names, there, strict=True)]

    def rows(values: Mapping[str, Sequence[float]], keys: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return the sums of the values by key, and epochs: samples read, divided by samples that exist."""
        result: dict[str, dict[str, float]] = {key: dict.fromkeys(values, 0) for key in keys}
        for i, key in enumerate(keys):
            for name, value in values.items():
                result[key][name] += value[i]
        for row in result.values():
            row |= {"tokens": round(row["tokens"]), "epochs": row["samples"] / row["samples_there"]}
        return result

    def both(shares: Mapping[str, Sequence[float]], read: Sequence[int]) -> dict[str, Any]:
        tokens = [n * t for n, t in zip(read, targets, strict=True)]
        values = {**shares, "samples": read, "samples_there": there, "tokens": tokens}
        return {"domains": rows(values, names), "sources": rows(values, sources)}

    phases = []
    for phase in mixed.phases:
        read = mixed.read(phase.from_step, phase.from_step + phase.steps)
        shares = {"by_size": phase.by_size, "tempered": phase.tempered, "share": phase.shares}
        phases.append({"from_step": phase.from_step, "steps": phase.steps, **both(shares, read)})
    steps = spec.train.steps
    read = mixed.read(0, steps)
    share = [n / (steps * spec.samples_per_step) for n in read]
    whole = both({"share": share, "tokens_there": [manifest.domains[name].tokens for name in names]}, read)
    for name, limit in zip(names, mixed.limits, strict=True):
        whole["domains"][name]["samples_at_most"] = limit
    return {
        "name": spec.name,
        "steps": steps,
        "samples_per_step": spec.samples_per_step,
        "seq_len": spec.data.seq_len,
        "phases": phases,
        "whole": whole,
    }


def _show(found: dict[str, Any]) -> None:
    samples = found["steps"] * found["samples_per_step"]
    tokens = sum(row["tokens"] for row in found["whole"]["sources"].values())
    out.print(
        f"{found['name']}: {found['steps']:,} steps of {found['samples_per_step']:,} samples: {samples:,} samples, "
        f"{tokens:,} tokens",
        soft_wrap=True,
    )
    several = len(found["phases"]) > 1
    for phase in found["phases"] if several else []:
        out.print(f"\nfrom step {phase['from_step']:,}, {phase['steps']:,} steps, shares in per cent", style="bold")
        columns = ["", "by size", "tempered", "limited", "samples", "epochs", "tokens"]
        print_whole(number_table(columns, [[name, *_shares(r), *_read(r)] for name, r in _nested(phase)]))
    out.print("\nthe whole training" + ("" if several else ", shares in per cent"), style="bold")
    shares = ["share"] if several else ["by size", "tempered", "limited"]
    columns = ["", "tokens there", "samples there", *shares, "samples", "epochs", "at most", "tokens"]
    lines = []
    for name, row in _nested(found["whole"]):
        kind = "sources" if name in found["whole"]["sources"] else "domains"
        one = [_percent(row["share"])] if several else _shares(found["phases"][0][kind][row["key"]])
        read, epochs, tokens = _read(row)
        most = row.get("samples_at_most")
        at_most = "" if most is None else _epochs(most / row["samples_there"])
        there = f"{row['tokens_there']:,}", f"{row['samples_there']:,}"
        lines.append([name, *there, *one, read, epochs, at_most, tokens])
    print_whole(number_table(columns, lines))


def _nested(table: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield each source, then its domains with indented names; each row also holds its key in the table."""
    for source, total in table["sources"].items():
        yield source, {**total, "key": source}
        for name, row in table["domains"].items():
            if source_of(name) == source:
                yield f"  {subfolder_of(name)}", {**row, "key": name}


def _shares(row: dict[str, float]) -> list[str]:
    return [_percent(row[column]) for column in ("by_size", "tempered", "share")]


def _read(row: dict[str, float]) -> tuple[str, str, str]:
    return f"{row['samples']:,}", _epochs(row["epochs"]), f"{row['tokens']:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _epochs(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.1 or not epochs else f"{epochs:.1g}"
