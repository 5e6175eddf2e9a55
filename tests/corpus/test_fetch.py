"""Fetching packages with clients of the tests' own on PATH, run as real processes."""

import shutil

import pytest

from mhmoe_ray.corpus.fetch import fetch
from mhmoe_ray.errors import DataError
from tests.corpus.made_packages import made, write_wheel

DEB = made("Debian", "p-doc", r".*")
WHEEL = made("PyPI", "P==1.0", r".*")


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """Return a function that puts an apt-get of these shell lines on an otherwise empty PATH.

    Its shell variable `package` holds the last argument, the name of the package.
    """
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def write(*lines: str) -> None:
        path = tmp_path / "bin" / "apt-get"
        path.write_text("\n".join(["#!/bin/sh", "for package; do :; done", *lines]))
        path.chmod(0o755)

    return write


def test_a_package_is_fetched_once(tmp_path, apt_get):
    apt_get('printf deb > "${package}_1%3a2.0-1_all.deb"')
    first = fetch(DEB, tmp_path / "cache")
    assert (first.version, first.bytes, first.path.read_text()) == ("1:2.0-1", 3, "deb")
    apt_get("exit 1")
    again = fetch(DEB, tmp_path / "cache")
    assert (again.path, again.version, again.bytes) == (first.path, first.version, 0)
    assert sorted(p.name for p in (tmp_path / "cache" / "Debian").iterdir()) == [first.path.name]


def test_an_interrupted_download_leaves_nothing_that_counts(tmp_path, apt_get):
    apt_get('printf d > "${package}_2_all.deb"', 'echo "E: the line went dead" >&2', "exit 100")
    with pytest.raises(DataError, match=r"package p-doc of Debian: the line went dead; .* apt-get update"):
        fetch(DEB, tmp_path / "cache")
    (tmp_path / "cache" / "Debian" / "p-doc.part").mkdir()  # as a killed run leaves it
    (tmp_path / "cache" / "Debian" / "p-doc.part" / "p-doc_2_all.deb").write_text("d")
    apt_get('printf deb > "${package}_2_all.deb"')
    assert fetch(DEB, tmp_path / "cache").path.read_text() == "deb"


def test_no_client(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DataError, match=r"packages of Debian: there is no apt-get here; those that are not in .* left out"
    ):
        fetch(DEB, tmp_path / "cache")


def test_a_wheel_in_the_cache_needs_no_client(tmp_path, monkeypatch):
    path = write_wheel(tmp_path / "PyPI" / "p-1.0-py3-none-any.whl", {})
    write_wheel(tmp_path / "PyPI" / "p-1.0.1-py3-none-any.whl", {})
    monkeypatch.setenv("PATH", "")
    fetched = fetch(WHEEL, tmp_path)
    assert (fetched.path, fetched.version) == (path, "1.0")


@pytest.mark.skipif(not shutil.which("pip"), reason="there is no pip")
def test_pip_without_an_index_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"package P==1.0 of PyPI: .*no.*; look at the network"):
        fetch(WHEEL, tmp_path)
    assert list((tmp_path / "PyPI").iterdir()) == []
