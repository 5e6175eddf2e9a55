import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest

from mhmoe_ray.cluster.connect import use
from mhmoe_ray.cluster.tokens import state_folder, state_lock
from mhmoe_ray.errors import ClusterError


def test_state_folder_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "a" / "b"))
    assert state_folder() == tmp_path / "a" / "b"
    assert state_folder().stat().st_mode & 0o777 == 0o700


def test_state_folder_follows_xdg_only_if_absolute(tmp_path, monkeypatch):
    monkeypatch.delenv("MHMOE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert state_folder() == tmp_path / "state/mhmoe"
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert state_folder() == Path.home() / ".local/state/mhmoe"


def test_state_folder_that_cannot_be_created_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ClusterError, match="Not a directory; set MHMOE_HOME to one that you can write"):
        state_folder()


def test_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    """Some shared file systems do not support locks."""

    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    message = "No locks available; set MHMOE_HOME to one that you can write and lock"
    with pytest.raises(ClusterError, match=message), state_lock():
        pytest.fail("it is not held")


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(ClusterError, match="File too large; set MHMOE_HOME to one that you can write"):
            use("lab", "http://lab:8265")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
