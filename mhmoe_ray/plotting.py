"""Figures in one common style, saved as PNG files; they need matplotlib, which the extra `plots` installs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, whose colours colour-blind readers can tell apart. Its yellow is left out because it is hard
# to see on white paper.
BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"
COLOURS = (BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Equal figures have equal bytes: without it, the ids of an SVG file are random.
    "svg.hashsalt": "mhmoe",
}
ROW_INCHES = 0.22
"""Height in inches of a row in a figure with one row per item, such as a layer or a domain."""
MOST_INCHES = 300.0
"""Largest width or height of a figure in inches; a thousand rows fit."""
MOST_PIXELS = 30_000
"""Largest width or height of a saved figure in pixels."""
DPI = 200


@contextmanager
def style() -> Iterator[None]:
    """Apply the common style to all figures drawn within the context; a missing matplotlib is a DataError."""
    try:
        import matplotlib as mpl
    except ImportError as e:
        raise DataError(
            "images", "matplotlib is missing", "pip install 'mhmoe-ray[plots]', or [report] for reports"
        ) from e
    with mpl.rc_context(_STYLE):
        yield


def check(path: Path) -> None:
    """Raise a DataError, before a long measurement, if matplotlib is missing or `path` cannot be written."""
    with style(), _writing(path):
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, each side limited to `MOST_INCHES`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(min(MOST_INCHES, width), min(MOST_INCHES, height)), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG file with `DPI`, or less if a side would exceed `MOST_PIXELS`; a failed write is a DataError."""
    with _writing(path):
        figure.savefig(path, format="png", dpi=min(DPI, MOST_PIXELS / max(figure.get_size_inches())))


def short(number: int) -> str:
    """Format a number in the largest binary unit that divides it: 1K for 1024, 3M for 3 * 2^20, 1,536 for 1536."""
    for unit in ("", "K", "M", "G"):
        if number < 1024 or number % 1024:
            return f"{number:,}{unit}"
        number //= 1024
    return f"{number:,}T"


@contextmanager
def writing(subject: str, fix: str) -> Iterator[None]:
    """Context manager that turns an OSError into a `DataError` about `subject`, with the remedy `fix`."""
    try:
        yield
    except OSError as e:
        raise DataError(subject, e.strerror or str(e), fix) from e


def _writing(path: Path) -> AbstractContextManager[None]:
    return writing(f"image {path}", "name a file you can write")
