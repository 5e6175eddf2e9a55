"""Tests of the copies of job logs in the run directory: short ones are complete, long ones are limited, and none has
secrets."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest

from mhmoe_ray.runs import logs
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.runs.logs import LogArchiver, Redactor, archived_lines
from mhmoe_ray.storage import ObjectPath
from tests.support.specs import tiny_spec


@pytest.fixture(params=["here", "on S3"])
def run(request, tmp_path):
    """Return a run in a local folder or in a bucket."""
    spec = tiny_spec(tmp_path)
    if request.param == "on S3":
        query, _ = request.getfixturevalue("s3")
        spec = spec.model_copy(update={"storage": ObjectPath(f"s3://bucket/{tmp_path.name}?{query}")})
    return create_run(spec)


def test_log_is_copied_line_by_line(run, tmp_path):
    source = tmp_path / "job.log"
    source.write_text("one\ntw")
    archiver = LogArchiver(run, 1, source, Redactor({}))
    archiver.copy()
    assert list(archived_lines(run, 1)) == ["one"]
    with source.open("a") as file:
        file.write("o\nthree")
    archiver.copy()
    archiver.copy(include_partial_line=True)
    assert list(archived_lines(run, 1)) == ["one", "two", "three"]
    assert archived_lines(run, 2) is None


def test_lines_are_kept_once_if_the_storage_fails_for_a_while(run, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "SEGMENT_BYTES", 40)
    source, can_write = tmp_path / "job.log", iter([True, False, False, False, True])
    lines = [f"line {i:02d}" for i in range(9)]

    def fail(original):
        def write(path, *args):
            if path.parent == archiver._folder and not next(can_write, True):
                raise OSError("it does not answer")
            return original(path, *args)

        return write

    archiver = LogArchiver(run, 1, source, Redactor({}))
    if isinstance(run.path, ObjectPath):
        monkeypatch.setattr(ObjectPath, "write_bytes", fail(ObjectPath.write_bytes))
    else:
        monkeypatch.setattr(type(tmp_path), "open", fail(type(tmp_path).open))
    for end in (3, 6, 7, 8, 9):
        with open(source, "w") as file:  # noqa: PTH123  # Path.open fails in this test
            file.write("".join(f"{line}\n" for line in lines[:end]))
        with suppress(OSError):
            archiver.copy()
    monkeypatch.undo()
    assert list(archived_lines(run, 1)) == lines


def test_first_and_newest_segments_of_a_long_log_are_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "SEGMENT_BYTES", 1000)
    source = tmp_path / "job.log"
    lines = [f"line {i:06d}" for i in range(3000)]
    source.write_text("".join(f"{line}\n" for line in lines))
    LogArchiver(run, 1, source, Redactor({})).copy()
    log_lines = list(archived_lines(run, 1))
    assert log_lines[0] == lines[0]
    assert log_lines[-1] == lines[-1]
    assert sum("were not kept" in line for line in log_lines) == 1
    sizes = [path.stat().st_size for path in (run.logs / "0001").iterdir()]
    assert len(sizes) == 1 + logs.NEWEST_SEGMENTS
    assert max(sizes) <= 1000


def test_newest_attempts_are_kept(run, tmp_path):
    source = tmp_path / "job.log"
    source.write_text("a line\n")
    for attempt in range(1, 8):
        LogArchiver(run, attempt, source, Redactor({})).copy()
    assert [path.name for path in sorted(run.logs.iterdir())] == ["0004", "0005", "0006", "0007"]


def test_secrets_are_redacted(tmp_path):
    (tmp_path / "token").write_text("token-of-the-cluster\n")
    redact = Redactor({
        "AWS_SECRET_ACCESS_KEY": "abc/def+ghi", "MY_API_KEY": "key-of-mine", "HF_TOKEN": "short",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "TOKEN_URL": "https://login.example", "PATH": "/usr/bin",
    })  # fmt: skip
    text = (
        "abc/def+ghi, key-of-mine and token-of-the-cluster; gs://me:password@bucket/x, hf_abcdefghijklmnopqrst, "
        "AKIAIOSFODNN7EXAMPLE, Authorization: Bearer eyJhbGciOi.x.y; loss 3.2, /usr/bin, https://login.example, short"
    )
    assert redact(text) == (
        "***, *** and ***; gs://***@bucket/x, ***, ***, Authorization: Bearer ***; "
        "loss 3.2, /usr/bin, https://login.example, short"
    )


@pytest.mark.parametrize("end", ["print('last', end='')", "raise RuntimeError('it broke')", "sys.exit(3)"])
def test_log_is_copied_until_the_process_ends(tmp_path, end):
    run = create_run(tiny_spec(tmp_path))
    code = (
        "import sys; from mhmoe_ray.runs.directory import RunDir; from mhmoe_ray.runs.logs import archive_log\n"
        "from pathlib import Path\n"
        f"print('first'); archive_log(RunDir(Path({str(run.path)!r})), 1); print('its token', 'secret-of-mine')\n{end}"
    )
    with (tmp_path / "job.log").open("w") as file:
        environment = {**os.environ, "SOME_TOKEN": "secret-of-mine"}
        subprocess.run([sys.executable, "-c", code], stdout=file, stderr=file, env=environment, check=False)
    expected = (tmp_path / "job.log").read_text().replace("secret-of-mine", "***").splitlines()
    assert expected[:2] == ["first", "its token ***"]
    assert list(archived_lines(run, 1)) == expected
