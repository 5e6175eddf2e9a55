"""The two trees that are compared: a commit, and this working tree."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit_of(name: str) -> str:
    """Return the full hash of the commit that a name of git stands for, such as a branch or a short hash."""
    return _git("rev-parse", "--verify", f"{name}^{{commit}}").strip()


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into `folder`, as a git worktree that exists during the block, and yield the folder."""
    _git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


@contextmanager
def working_copy(folder: Path) -> Iterator[Path]:
    """Copy all files of the working tree that git does not ignore into `folder`, and yield the folder."""
    # The working tree may be edited during the comparison, because only this copy of it is compared.
    for name in _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    yield folder


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True).stdout
