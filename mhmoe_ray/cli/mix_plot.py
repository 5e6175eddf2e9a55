"""The picture of `mhmoe data mix`: shares by phase on a logarithmic scale, and epochs of the whole training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.pictures import COLOURS, ROW_INCHES, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = {"by_size": ("by size", "o"), "tempered": ("tempered", "s"), "share": ("after limits", "x")}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a mixture.

    Args:
        found: as `mhmoe data mix --json` prints it.
        path: of a PNG file.

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
