"""The state folder of this user, and Ray's authentication tokens: our own for local clusters, the user's for others.

`ray start` runs without authentication if it finds no token file. So local clusters always get a token file, in the
state folder. The file ~/.ray/auth_token belongs to the user and is only read. A token travels in files and HTTP
headers, never on a command line.
"""

import fcntl
import os
import secrets
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhmoe_ray.errors import ClusterError, TokenError
from mhmoe_ray.storage import write_json


def state_folder() -> Path:
    """Return $MHMOE_HOME, else $XDG_STATE_HOME/mhmoe, else ~/.local/state/mhmoe, created with mode 0700 if missing.

    A folder that cannot be created is a ClusterError.
    """
    configured_home, xdg = os.environ.get("MHMOE_HOME"), os.environ.get("XDG_STATE_HOME")
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path.home() / ".local/state"
    folder = Path(configured_home).absolute() if configured_home else base / "mhmoe"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise _unusable_folder_error(folder, e) from e
    return folder


def _unusable_folder_error(folder: Path, e: OSError) -> ClusterError:
    return ClusterError(f"folder {folder}", e.strerror or str(e), "set MHMOE_HOME to one that you can write and lock")


@contextmanager
def state_lock(name: str = "lock") -> Iterator[Path]:
    """Wait for a lock of the state folder, hold it, and yield the folder; an unusable folder is a ClusterError.

    Commands hold the default lock while they start, stop or look for the local cluster, or change the named clusters.
    """
    folder = state_folder()
    try:
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise _unusable_folder_error(folder, e) from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as e:
            raise _unusable_folder_error(folder, e) from e
        yield folder
    finally:
        os.close(fd)


def write_state(name: str, value: dict[str, Any]) -> None:
    """Write a JSON file of the state folder, which its owner alone can read; a failed write is a ClusterError."""
    path = state_folder() / name
    try:
        write_json(path, value)
        # The files list host names and paths of token files, which other users of this machine must not read.
        path.chmod(0o600)
    except OSError as e:
        raise _unusable_folder_error(path.parent, e) from e


@dataclass(frozen=True)
class Token:
    """An authentication token of a Ray cluster."""

    value: str = field(repr=False)
    source: str
    """File or environment variable that the token was read from, for error messages."""
    file: Path | None = None
    """Path of the file that the token was read from; None for the environment variable RAY_AUTH_TOKEN."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.value}"}

    @property
    def print_command(self) -> str:
        """Shell command that prints the token."""
        return f"cat {shlex.quote(str(self.file))}" if self.file else "printenv RAY_AUTH_TOKEN"


def token_file() -> Path:
    return state_folder() / "ray_token"


def make_token() -> Path:
    """Return the path of the file with our own token, created if missing; the caller holds the state folder's lock."""
    path = token_file()
    if not path.exists():
        try:
            fd, partial = tempfile.mkstemp(dir=path.parent)  # mkstemp makes the file readable by its owner only.
            with os.fdopen(fd, "w") as f:
                f.write(secrets.token_hex(32))
                f.flush()
                os.fsync(f.fileno())
            Path(partial).replace(path)
        except OSError as e:
            raise _unusable_folder_error(path.parent, e) from e
    return path


def own_token() -> Token:
    """Return the token of clusters that this package starts; a missing or empty file is a TokenError."""
    return _read_token(token_file(), str(token_file()), "run `mhmoe cluster down`, then `mhmoe cluster up`")


def user_token() -> Token | None:
    """Return the token that Ray itself would send, None if the user has or wants none; a bad file is a TokenError."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return _read_token(Path(path), f"RAY_AUTH_TOKEN_PATH ({path})", "name a file that holds the cluster's token")
    default = Path.home() / ".ray/auth_token"
    return _read_token(default, str(default), "write the cluster's token into it") if default.exists() else None


def token_from_file(path: Path) -> Token:
    """Return the token in a file that the user has named for a cluster; an unusable file is a TokenError."""
    return _read_token(path, str(path), "write the cluster's token into it, or name another file: mhmoe cluster use")


def refused_token_error(address: str, token: Token | None) -> TokenError:
    """Return the error for a cluster that answers 401 or 403 to this token; the token is None if none was sent."""
    if token is not None:
        reason = f"it refused the token of {token.source}"
    elif os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        reason = "it asks for a token, and RAY_AUTH_MODE=disabled keeps us from sending one"
    else:
        reason = "it asks for a token, and there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    fix = "put the cluster's token into a file and set RAY_AUTH_TOKEN_PATH to it"
    return TokenError(f"cluster {address}", reason, fix)


def _read_token(path: Path, source: str, fix: str) -> Token:
    try:
        value = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as e:
        raise TokenError(f"token of {source}", getattr(e, "strerror", None) or "it is not text", fix) from e
    if not value:
        raise TokenError(f"token of {source}", "the file is empty", fix)
    return Token(value, source, path)
