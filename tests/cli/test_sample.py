"""Tests of `mhmoe data sample` on a machine that can download nothing, or write nothing."""

import pytest

from tests.cli.run import mhmoe


def test_large_sample_without_clients_names_missing_packages(tmp_path):
    (tmp_path / "bin").mkdir()
    result = mhmoe(tmp_path, "data", "sample", "out", "--large", PATH=str(tmp_path / "bin"), PIP_NO_INDEX="1")
    *warnings, last_line = result.err.splitlines()
    assert result.code == 4
    assert last_line.startswith("error: data sample out: it has ")
    assert "not 100 MB and 15; see the warnings above" in last_line
    assert "Traceback" not in result.err
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: packages of Debian: there is no apt-get here; ")
    assert warnings[1].startswith("warning: package")
    assert "PyPI" in warnings[1]
    # These four domains exist nevertheless, because their texts come from installed packages and need no download.
    assert sorted(p.name for p in (tmp_path / "out" / "redpajama").iterdir()) == [
        "book",
        "c4",
        "github",
        "stackexchange",
    ]
    assert "redpajama/book" in result.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "out"]


def test_image_sample_without_clients_names_missing_artists(tmp_path):
    pytest.importorskip("PIL")
    pytest.importorskip("resvg_py")
    (tmp_path / "bin").mkdir()
    result = mhmoe(tmp_path, "data", "sample", "out", "--pictures", PATH=str(tmp_path / "bin"), PIP_NO_INDEX="1")
    *warnings, last_line = result.err.splitlines()
    assert result.code == 4
    assert last_line.startswith("error: data sample out: it has no images of noto, openmoji, stamps, gemojione; ")
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: packages of Debian: there is no apt-get here; ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin"]


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "out").write_text("a file")
    result = mhmoe(tmp_path, "data", "sample", "out")
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("error: data sample out: ")
    assert len(result.err.splitlines()) == 1
