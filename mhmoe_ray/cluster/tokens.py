"""The folder with this user's state, and Ray's tokens: our own for clusters that we start, the user's for others.

`ray start` runs open where it finds no token file, so we always give it one. It lies in our home: ~/.ray/auth_token is
the user's and is read here but never written. A token travels in files and HTTP headers, never on a command line.
"""

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mhmoe_ray.errors import ClusterError, TokenError


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


@dataclass(frozen=True)
class Token:
    value: str = field(repr=False)
    source: str
    """Where it was read, for messages."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.value}"}


def token_file() -> Path:
    return home() / "ray_token"


def make_token() -> Path:
    """The file with our own token, made if missing. Call it under the lock of the home."""
    path = token_file()
    if not path.exists():
        fd, partial = tempfile.mkstemp(dir=path.parent)  # readable by its owner only
        with os.fdopen(fd, "w") as f:
            f.write(secrets.token_hex(32))
            f.flush()
            os.fsync(f.fileno())
        Path(partial).replace(path)
    return path


def own_token() -> Token:
    """The token of clusters that we started.

    Raises:
        TokenError: its file is gone or empty.
    """
    return _read(token_file(), str(token_file()), "run `mhmoe cluster down`, then `mhmoe cluster up`")


def user_token() -> Token | None:
    """What Ray itself would send to a cluster that is not ours; None if the user has no token or switched them off.

    Raises:
        TokenError: RAY_AUTH_TOKEN_PATH names a file that holds no token.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _read(Path(path), f"RAY_AUTH_TOKEN_PATH ({path})", "name a file that holds the cluster's token")
    default = Path.home() / ".ray/auth_token"
    return _read(default, str(default), "write the cluster's token into it") if default.exists() else None


def token_in(path: Path) -> Token:
    """That of a file which the user has named for a cluster.

    Raises:
        TokenError: it holds none.
    """
    return _read(path, str(path), "write the cluster's token into it, or name another file: mhmoe cluster use")


def refused(address: str, token: Token | None) -> TokenError:
    """What to say when a cluster answers 401 or 403."""
    if token is not None:
        why = f"it refused the token of {token.source}"
    elif os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        why = "it wants a token and RAY_AUTH_MODE=disabled keeps us from sending one"
    else:
        why = "it wants a token and there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    fix = "put the cluster's token into a file and set RAY_AUTH_TOKEN_PATH to it"
    return TokenError(f"cluster {address}", why, fix)


def _read(path: Path, source: str, fix: str) -> Token:
    try:
        value = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as e:
        raise TokenError(f"token of {source}", getattr(e, "strerror", None) or "it is not text", fix) from e
    if not value:
        raise TokenError(f"token of {source}", "the file is empty", fix)
    return Token(value, source)
