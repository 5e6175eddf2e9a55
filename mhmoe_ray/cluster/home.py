"""The folder with our state of this user: the token of clusters we start, the record of the one that runs, names of
others."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhmoe_ray.errors import ClusterError


def home() -> Path:
    """$MHMOE_HOME, else $XDG_STATE_HOME/mhmoe, else ~/.local/state/mhmoe; made for its owner only if missing.

    Raises:
        ClusterError: it cannot be made.
    """
    given, xdg = os.environ.get("MHMOE_HOME"), os.environ.get("XDG_STATE_HOME")
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path.home() / ".local/state"
    folder = Path(given).absolute() if given else base / "mhmoe"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise _unusable(folder, e) from e
    return folder


def _unusable(folder: Path, e: OSError) -> ClusterError:
    return ClusterError(f"folder {folder}", e.strerror or str(e), "set MHMOE_HOME to one that you can write and lock")


@contextmanager
def locked(name: str = "lock") -> Iterator[Path]:
    """The home, while no other command holds the lock of this name: by default that of one who starts, stops or looks
    for the local cluster.

    Raises:
        ClusterError: it cannot be written, or its file system has no locks.
    """
    folder = home()
    try:
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise _unusable(folder, e) from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as e:
            raise _unusable(folder, e) from e
        yield folder
    finally:
        os.close(fd)
