"""Pictures in one common style, saved as PNG files; they need matplotlib, which the extra `plots` installs."""

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
}
ROW_INCHES = 0.22
"""Height in inches of one row in a picture with a row for each of many items, such as layers or domains."""
MOST_INCHES = 300.0
"""Largest width or height of a figure, in inches: enough for a picture of a thousand rows."""
MOST_PIXELS = 30_000
"""Largest width or height of a saved picture, in pixels."""
DPI = 200


@contextmanager
def style() -> Iterator[None]:
    """Apply the common style to everything that matplotlib draws within the context.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as e:
        raise DataError(
            "pictures", "matplotlib is missing", "pip install 'mhmoe-ray[plots]', or [report] for reports"
        ) from e
    with mpl.rc_context(_STYLE):
        yield


def check(path: Path) -> None:
    """Check that a picture can be drawn and saved at `path`, so that a long measurement does not fail at its end.

    Raises:
        DataError: matplotlib is not installed, or the file could not be written.
    """
    with style(), _writing(path):
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure with this width and height in inches, each limited to `MOST_INCHES`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(min(MOST_INCHES, width), min(MOST_INCHES, height)), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write the figure as a PNG file with `DPI` pixels per inch, or with fewer if a side would exceed `MOST_PIXELS`.

    Raises:
        DataError: the file cannot be written.
    """
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
    """Context manager that turns an OSError into a `DataError` about `subject`, with the remedy `fix` in its message.

    Raises:
        DataError: the storage refused an operation within the context.
    """
    try:
        yield
    except OSError as e:
        raise DataError(subject, e.strerror or str(e), fix) from e


def _writing(path: Path) -> AbstractContextManager[None]:
    """Context manager that turns an OSError into a `DataError` about the picture at `path`."""
    return writing(f"picture {path}", "name a file you can write")
