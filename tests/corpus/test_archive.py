import gzip
import shutil

import pytest

from mhmoe_ray.corpus.fetch import read_members
from mhmoe_ray.errors import DataError
from tests.corpus.made_packages import write_deb, write_wheel

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="there is no dpkg-deb")
FILES = {"usr/share/a.html": b"<p>a</p>", "usr/share/b.html.gz": gzip.compress(b"<p>b</p>"), "usr/share/c.png": b"c"}


def _is_page(name: str) -> bool:
    return ".html" in name


@needs_dpkg
@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_read_members_reads_a_deb_without_unpacking_it(tmp_path, kind):
    package = write_deb(tmp_path / "p_1_all.deb", FILES, kind, links={"usr/share/d.html": "/etc/passwd"})
    assert list(read_members(package, _is_page)) == [
        ("usr/share/a.html", b"<p>a</p>"),
        ("usr/share/b.html.gz", b"<p>b</p>"),
    ]
    assert list(tmp_path.iterdir()) == [package]


@needs_dpkg
def test_read_members_writes_no_file_for_a_path_outside_the_package(tmp_path):
    package = write_deb(tmp_path / "in" / "p_1_all.deb", {"../../evil.html": b"x", "/etc/evil.html": b"y"})
    assert [content for _, content in read_members(package, _is_page)] == [b"x", b"y"]
    assert list(tmp_path.rglob("*evil*")) == []


@needs_dpkg
def test_read_members_can_be_closed_early(tmp_path):
    package = write_deb(tmp_path / "p_1_all.deb", {f"{i}.html": b"x" * 100_000 for i in range(50)})
    members = read_members(package, _is_page)
    assert next(members)[0] == "0.html"
    members.close()


@needs_dpkg
@pytest.mark.parametrize("length", [0, 30, 400, -40])
def test_read_members_reports_a_truncated_deb(tmp_path, length):
    package = write_deb(tmp_path / "p_1_all.deb", FILES)
    package.write_bytes(package.read_bytes()[:length])
    with pytest.raises(DataError, match=r"p_1_all\.deb: it cannot be read .*; delete it"):
        list(read_members(package, _is_page))


def test_read_members_reports_a_missing_dpkg_deb(tmp_path, monkeypatch):
    package = write_deb(tmp_path / "p_1_all.deb", FILES)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="there is no dpkg-deb"):
        list(read_members(package, _is_page))


def test_read_members_reads_a_wheel(tmp_path):
    package = write_wheel(tmp_path / "p-1-py3-none-any.whl", FILES)
    assert [name for name, _ in read_members(package, _is_page)] == ["usr/share/a.html", "usr/share/b.html.gz"]
    package.write_bytes(package.read_bytes()[:-30])
    with pytest.raises(DataError, match="it cannot be read"):
        list(read_members(package, _is_page))
