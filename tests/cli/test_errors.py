"""Users' mistakes: one clear line, an exit code by kind, no traceback."""

import json
import re
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from mhmoe_ray.cluster.local import RECORD
from mhmoe_ray.data.prepare.chunks import CHUNK, Chunk, Limit, read_chunks
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.errors import (
    DOCTOR_EXIT_CODE,
    CheckpointError,
    DataError,
    MhmoeError,
    RunError,
    ServeError,
    SpecError,
    TokenError,
    logged,
    logging_errors,
)
from tests.cli.conftest import write_spec
from tests.cli.run import Result, assert_one_line, mhmoe
from tests.data.sources.read import data_spec
from tests.data.texts import documents, write_documents


def test_a_wrong_key(corpus):
    result = mhmoe(corpus, "plan", "spec.yaml", "--set", "train.step=5")
    assert_one_line(result, 3, "unknown key 'train.step'", "did you mean 'steps'?")


def test_a_missing_spec(tmp_path):
    assert_one_line(mhmoe(tmp_path, "submit", "nowhere.yaml"), 3, "spec nowhere.yaml", "No such file")


def test_a_missing_source(tmp_path):
    write_spec(tmp_path)
    assert_one_line(mhmoe(tmp_path, "submit", "spec.yaml"), 4, "source web", "there is no folder", "mhmoe data sample")


def test_an_unknown_run(tmp_path):
    for verb in ("status", "logs", "stop", "resume"):
        assert_one_line(mhmoe(tmp_path, verb, "tiny-123456"), 7, "run tiny-123456", "mhmoe list")
    assert_one_line(mhmoe(tmp_path, "serve", "deploy", "tiny-123456"), 7, "run tiny-123456")


def test_a_key_of_an_address_that_is_none(tmp_path):
    result = mhmoe(tmp_path, "list", "--storage", "s3://bucket/runs?regoin=eu")
    assert_one_line(result, 7, "storage s3://bucket/runs?regoin=eu", "'regoin'", "check the address")


def test_a_port_where_nothing_listens(corpus):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
        assert_one_line(mhmoe(corpus, "submit", "spec.yaml", "--address", address), 5, address, "nothing answers there")
        assert_one_line(mhmoe(corpus, "serve", "status", "--address", address), 5, address)


def test_another_cluster_is_asked_also_where_the_local_one_is_another_machines(corpus, tmp_path):
    cluster = {"pid": 1, "address": "http://127.0.0.1:23456", "gcs_address": "", "cpus": 8, "host": "elsewhere"}
    (tmp_path / RECORD).write_text(json.dumps({**cluster, "folder": "/tmp/mhmoe-elsewhere"}))
    words = ("--address", "http://127.0.0.1:1")
    for verb in (("data", "inspect", "raw"), ("submit", "spec.yaml")):
        result = mhmoe(corpus, *verb, *words, MHMOE_HOME=str(tmp_path))
        assert_one_line(result, 5, "http://127.0.0.1:1", "nothing answers there")


@pytest.mark.ray
def test_a_missing_token(corpus, local_cluster, tmp_path):
    """The home of another user has no token of this cluster."""
    home = {"MHMOE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    result = mhmoe(corpus, "submit", "spec.yaml", "--address", local_cluster.address, **home)
    assert_one_line(result, 6, local_cluster.address, "RAY_AUTH_TOKEN")


class Prepared(NamedTuple):
    """A folder with a spec whose data is prepared, and the results of the refused and of the allowed command."""

    folder: Path
    refused: Result
    left: set[str]
    """Names of the files that the refused command left in the one folder where it had worked."""
    allowed: dict[str, Any]


ODD = "odd [o]#1?"
BESIDE = "odd.partial-of-another"


@pytest.fixture(scope="module")
def prepared(local_cluster, tmp_path_factory):
    """Prepare text with a torn line and a cut file into a folder of an odd name, refused at first and then allowed."""
    folder = tmp_path_factory.mktemp("prepared")
    torn, cut, whole = (folder / "raw" / name for name in ("a/one.jsonl", "a/two.jsonl.zst", "b/three.jsonl.gz"))
    for file, count in ((torn, 40), (cut, 25), (whole, 30)):
        write_documents(file, documents(file.stem, count))
    tear(torn)
    cut.write_bytes(cut.read_bytes()[:-20])
    (folder / BESIDE).mkdir()
    write_spec(folder, data={"prepared": ODD, "max_bad_lines": 1})
    refused = mhmoe(folder, "data", "prepare", "spec.yaml")
    [work] = (path for path in folder.glob("odd*") if path.name != BESIDE)
    left = {path.name for path in work.iterdir()}
    allowed = mhmoe(folder, "data", "prepare", "spec.yaml", "--set", "data.max_bad_files=1", "--json").json()
    return Prepared(folder, refused, left, allowed)


def tear(file):
    with file.open("a") as f:
        f.write('{"text": "torn\n')


@pytest.mark.ray
def test_a_cut_file_is_refused_and_with_a_corrupt_line_quarantined(prepared):
    assert_one_line(prepared.refused, 4, "two.jsonl.zst line", "its zstd frame is cut off", "data.max_bad_files is 0")
    assert prepared.left == {"parts", "progress.json"}, "nothing half-made is left"

    allowed = prepared.allowed
    assert allowed["bad_lines"] == 2
    assert allowed["domains"]["web/a"]["quarantined"] == {"it is not JSON": 1, "a part of the file is lost": 1}
    assert not allowed["domains"]["web/b"]["quarantined"]
    torn, cut = map(json.loads, (prepared.folder / ODD / "quarantine.jsonl").read_text().splitlines())
    assert (torn["domain"], torn["line"]) == ("web/a", 41)
    assert (cut["domain"], cut["detail"]) == ("web/a", "its zstd frame is cut off")


def test_a_corrupt_line_is_refused(tmp_path):
    """The reading of a job refuses the line and goes no further; the job reports it as it reports the cut file
    above."""
    write_documents(tmp_path / "one.jsonl", documents("one", 40))
    tear(tmp_path / "one.jsonl")
    spec = data_spec(tmp_path)
    [file] = find_files(spec)
    rows, limit = pa.Table.from_pylist([{"number": 0, **file._asdict()}]), Limit(spec, [file])
    [table] = read_chunks(rows, spec=spec, limit=limit, quarantine=tmp_path, characters=CHUNK)
    chunk = Chunk.of_table(table)
    assert chunk.stopped
    told = str(limit.error(chunk.tally))
    for part in ("one.jsonl line 41", "it is not JSON", "data.max_bad_lines"):
        assert part in told


@pytest.mark.ray
@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("data.validation_fraction=1e-12", "no document fell into the held-out share"),
        pytest.param("data.seq_len=100000", "no domain fills a single sample", marks=pytest.mark.slow),
    ],
)
def test_too_little_text_to_hold_any_out_or_to_fill_a_sample(local_cluster, tmp_path, override, why):
    write_documents(tmp_path / "raw" / "a" / "one.jsonl", documents("one", 40))
    write_spec(tmp_path)
    result = mhmoe(tmp_path, "data", "prepare", "spec.yaml", "--set", override)
    assert_one_line(result, 4, why, override.split("=")[0])


@pytest.mark.ray
def test_a_prepared_folder_may_have_any_name_and_nothing_is_left_beside_it(prepared):
    """The job's name contains the folder's name and is part of URLs."""
    folder = prepared.folder
    assert prepared.allowed["domains"].keys() == {"web/a", "web/b"}
    assert sorted(path.name for path in folder.glob("odd*")) == [ODD, BESIDE]
    left = folder / f"{ODD}.partial-01234567"
    left.mkdir()
    assert mhmoe(folder, "data", "prepare", "spec.yaml", "--json").code == 0
    assert sorted(path.name for path in folder.glob("odd*")) == [ODD, BESIDE]


@pytest.mark.ray
def test_prepared_data_of_other_settings(prepared):
    result = mhmoe(prepared.folder, "data", "prepare", "spec.yaml", "--set", "data.seq_len=8")
    assert_one_line(result, 4, "seq_len = 16, and the spec says 8", "data.prepared")


@pytest.mark.ray
def test_a_damaged_prepared_shard(prepared):
    shard = next((prepared.folder / ODD / "train").rglob("*.arrow"))
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    shard.write_bytes(damaged)
    result = mhmoe(prepared.folder, "submit", "spec.yaml")
    shard.write_bytes(whole)
    assert result.code == 9
    assert result.err.splitlines()[-1].startswith("error: run tiny-")
    assert "its content is not what was written" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", [SpecError, DataError, TokenError, RunError, CheckpointError, ServeError])
def test_an_error_in_a_jobs_log_is_of_its_own_kind(kind, capsys):
    told = kind("task a: b", "it is not: there; or", "see `x`")
    with pytest.raises(SystemExit) as ended, logging_errors():
        raise told
    assert ended.value.code == kind.exit_code
    found = logged(f"error: of others\n{capsys.readouterr().out}more\n")
    assert type(found) is kind
    assert str(found) == str(told)
    assert logged("error: of others\n") is None


def test_readme_lists_every_exit_code():
    def codes(of):
        return {of.exit_code}.union(*(codes(below) for below in of.__subclasses__()))

    readme = (Path(__file__).parents[2] / "mhmoe_ray/cli/README.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) +\| ", readme, re.M)}
    assert listed == codes(MhmoeError) | {2, DOCTOR_EXIT_CODE}
