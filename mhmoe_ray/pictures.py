"""Pictures of one look, as files (extra `plots`)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow, which paper swallows.
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
"""Of a picture with a row for each of many."""
MOST_INCHES = 300.0
"""Of a picture of a thousand rows."""
MOST_PIXELS = 30_000
"""Of a side."""
DPI = 200


@contextmanager
def style() -> Iterator[None]:
    """What is drawn within has the one look.

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
    """Before what is to be drawn is measured, not after.

    Raises:
        DataError: matplotlib is not installed, or the file could not be written.
    """
    with style(), _writing(path):
        was_there = path.exists()
        path.open("ab").close()
        if not was_there:
            path.unlink()


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, or of the most there may be."""
    from matplotlib.figure import Figure

    return Figure(figsize=(min(MOST_INCHES, width), min(MOST_INCHES, height)), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG.

    Raises:
        DataError: the file cannot be written.
    """
    with _writing(path):
        figure.savefig(path, format="png", dpi=min(DPI, MOST_PIXELS / max(figure.get_size_inches())))


def short(number: int) -> str:
    """1K for 1024, 3M for 3 * 2^20; whole where it is no multiple of these."""
    for unit in ("", "K", "M", "G"):
        if number < 1024 or number % 1024:
            return f"{number:,}{unit}"
        number //= 1024
    return f"{number:,}T"


@contextmanager
def writing(what: str, fix: str) -> Iterator[None]:
    """Turns what storage refuses into a user's mistake.

    Raises:
        DataError: something could not be written.
    """
    try:
        yield
    except OSError as e:
        raise DataError(what, e.strerror or str(e), fix) from e


def _writing(path: Path) -> AbstractContextManager[None]:
    return writing(f"picture {path}", "name a file you can write")
