"""The picture of `mhmoe data inspect`: how long documents are by domain, and fertility by language."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.pictures import BLUE, ROW_INCHES, VERMILION, new_figure, save, short, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


BAR_INCHES = 0.2  # of the scale of shades


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a survey.

    Args:
        found: as `mhmoe data inspect --json` prints it.
        path: of a PNG file.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    with style():
        save(_picture(found), path)


def _picture(found: dict[str, Any]) -> "Figure":
    rows = max(len(found["domains"]), len(found["languages"]))
    figure = new_figure(13, 2.4 + ROW_INCHES * rows)
    panels = 3 if found["tokenized"] else 2
    axes = figure.subplots(1, panels, width_ratios=[1.6, *[1] * (panels - 1)])
    for axis in axes:
        axis.xaxis.tick_top()
    _plot_lengths(figure, axes[0], found)
    languages = {name or "(not named)": row for name, row in found["languages"].items()}
    if found["tokenized"]:
        _plot_bars(axes[1], {n: row["tokens_per_word"] for n, row in languages.items()}, "tokens per word", BLUE)
        _plot_bars(
            axes[2], {n: row["tokens_per_character"] for n, row in languages.items()}, "tokens per character", VERMILION
        )
    else:
        _plot_bars(axes[1], {n: row["bytes"] / 1e6 for n, row in languages.items()}, "MB of text", BLUE)
    for axis in axes:  # rows of one height, whether there are more domains or more languages
        axis.set_ylim(rows - 0.5, -0.5)
    return figure


def _plot_lengths(figure: Any, axis: Any, found: dict[str, Any]) -> None:
    """A row of shades for each domain: its share of documents in each octave."""
    key, unit = ("lengths_in_tokens", "tokens") if found["tokenized"] else ("lengths_in_characters", "characters")
    by_domain = {
        name: {int(octave): n for octave, n in row[key]["octaves"].items()}
        for name, row in found["domains"].items()
        if row[key]
    }
    every = [octave for counts in by_domain.values() for octave in counts if octave]
    powers = range(min(every, default=1).bit_length() - 1, max(every, default=1).bit_length())
    shares = [
        [100 * counts.get(1 << power, 0) / max(1, sum(counts.values())) for power in powers]
        for counts in by_domain.values()
    ]
    image = axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation="none")
    axis.set_yticks(range(len(by_domain)), by_domain)
    step = -(-len(powers) // 8)
    axis.set_xticks([i - 0.5 for i in range(0, len(powers), step)], [short(1 << p) for p in powers[::step]])
    axis.set_title(f"length of documents in {unit}")
    figure.colorbar(
        image,
        ax=axis,
        label="per cent of a domain's documents",
        location="bottom",
        fraction=BAR_INCHES / figure.get_figheight(),
        pad=BAR_INCHES / figure.get_figheight() / 2,
        aspect=40,
    )


def _plot_bars(axis: Any, values: dict[str, float | None], title: str, color: str) -> None:
    """One bar a language; none where there is no figure."""
    axis.barh(range(len(values)), [value or 0 for value in values.values()], color=color)
    axis.set_yticks(range(len(values)), values)
    axis.set_title(title)
    axis.grid(axis="x", alpha=0.3)
