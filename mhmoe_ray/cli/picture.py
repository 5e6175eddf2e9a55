"""A picture with a row for each domain: making it and writing it."""

from pathlib import Path
from typing import TYPE_CHECKING

from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_INCHES = 0.22
MOST_INCHES = 300.0
"""Of a picture of a thousand domains."""


def new_figure(width: float, height: float, path: Path) -> "Figure":
    """An empty figure.

    Args:
        width: in inches.
        height: in inches.
        path: of the file it is for.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise DataError(f"picture {path}", "matplotlib is missing", "pip install 'mhmoe-ray[plots]'") from e
    return Figure(figsize=(min(MOST_INCHES, width), min(MOST_INCHES, height)), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        figure.savefig(path, format="png")
    except OSError as e:
        raise DataError(f"picture {path}", e.strerror or str(e), "name a file you can write") from e
