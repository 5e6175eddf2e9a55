"""Tests that mistakes of users give one clear line and the exit code of their kind, without a traceback."""

import json
import re
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from mhmoe_ray.cluster.local import RECORD
from mhmoe_ray.data.prepare.chunks import CHUNK_CHARACTERS, DocumentChunk, QuarantineLimit, read_chunks
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
from tests.data.texts import make_documents, write_documents


def test_wrong_key_is_one_line(corpus):
    result = mhmoe(corpus, "plan", "spec.yaml", "--set", "train.step=5")
    assert_one_line(result, 3, "unknown key 'train.step'", "did you mean 'steps'?")


def test_missing_spec_is_one_line(tmp_path):
    assert_one_line(mhmoe(tmp_path, "submit", "nowhere.yaml"), 3, "spec nowhere.yaml", "No such file")


def test_missing_source_is_one_line(tmp_path):
    write_spec(tmp_path)
    assert_one_line(
        mhmoe(tmp_path, "submit", "spec.yaml"), 4, "source web", "there is no file or folder", "mhmoe data sample"
    )


def test_unknown_run_is_one_line(tmp_path):
    for verb in ("status", "logs", "stop", "resume"):
        assert_one_line(mhmoe(tmp_path, verb, "tiny-123456"), 7, "run tiny-123456", "mhmoe list")
    assert_one_line(mhmoe(tmp_path, "serve", "deploy", "tiny-123456"), 7, "run tiny-123456")


def test_unknown_key_of_a_storage_address_is_one_line(tmp_path):
    result = mhmoe(tmp_path, "list", "--storage", "s3://bucket/runs?regoin=eu")
    assert_one_line(result, 7, "storage s3://bucket/runs?regoin=eu", "'regoin'", "check the address")


def test_unused_port_is_one_line(corpus):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
        assert_one_line(mhmoe(corpus, "submit", "spec.yaml", "--address", address), 5, address, "nothing answers there")
        assert_one_line(mhmoe(corpus, "serve", "status", "--address", address), 5, address)


def test_address_option_works_beside_the_local_cluster_of_another_machine(corpus, tmp_path):
    cluster = {"pid": 1, "address": "http://127.0.0.1:23456", "gcs_address": "", "cpus": 8, "host": "elsewhere"}
    (tmp_path / RECORD).write_text(json.dumps({**cluster, "folder": "/tmp/mhmoe-elsewhere"}))
    words = ("--address", "http://127.0.0.1:1")
    for verb in (("data", "inspect", "raw"), ("submit", "spec.yaml")):
        result = mhmoe(corpus, *verb, *words, MHMOE_HOME=str(tmp_path))
        assert_one_line(result, 5, "http://127.0.0.1:1", "nothing answers there")


@pytest.mark.ray
def test_missing_token_is_one_line(corpus, local_cluster, tmp_path):
    """The command runs with an empty home folder, which has no token for the cluster."""
    home = {"MHMOE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
    result = mhmoe(corpus, "submit", "spec.yaml", "--address", local_cluster.address, **home)
    assert_one_line(result, 6, local_cluster.address, "RAY_AUTH_TOKEN")


class PreparedFolder(NamedTuple):
    """A folder whose data was prepared at the second try, with the results of both tries."""

    folder: Path
    refused_result: Result
    leftover_names: set[str]
    """Names of the files that the refused command left in its work folder."""
    manifest: dict[str, Any]


PREPARED_NAME = "odd [o]#1?"
OTHER_NAME = "odd.partial-of-another"


@pytest.fixture(scope="module")
def prepared(local_cluster, tmp_path_factory):
    """Prepare text with a torn line and a cut file in a folder with an odd name: first refused, then allowed."""
    folder = tmp_path_factory.mktemp("prepared")
    torn_file, cut_file, whole_file = (
        folder / "raw" / name for name in ("a/one.jsonl", "a/two.jsonl.zst", "b/three.jsonl.gz")
    )
    for file, count in ((torn_file, 40), (cut_file, 25), (whole_file, 30)):
        write_documents(file, make_documents(file.stem, count))
    append_torn_line(torn_file)
    cut_file.write_bytes(cut_file.read_bytes()[:-20])
    (folder / OTHER_NAME).mkdir()
    write_spec(folder, data={"prepared": PREPARED_NAME, "max_bad_lines": 1})
    refused_result = mhmoe(folder, "data", "prepare", "spec.yaml")
    [work_folder] = (path for path in folder.glob("odd*") if path.name != OTHER_NAME)
    leftover_names = {path.name for path in work_folder.iterdir()}
    manifest = mhmoe(folder, "data", "prepare", "spec.yaml", "--set", "data.max_bad_files=1", "--json").json()
    return PreparedFolder(folder, refused_result, leftover_names, manifest)


def append_torn_line(file):
    with file.open("a") as f:
        f.write('{"text": "torn\n')


@pytest.mark.ray
def test_cut_file_is_refused_and_then_quarantined_with_a_corrupt_line(prepared):
    assert_one_line(
        prepared.refused_result, 4, "two.jsonl.zst line", "its zstd frame is cut off", "data.max_bad_files is 0"
    )
    assert prepared.leftover_names == {"progress.json"}, "a half-written file is left"

    manifest = prepared.manifest
    assert manifest["bad_lines"] == 2
    assert manifest["domains"]["web/a"]["quarantined"] == {"it is not JSON": 1, "a part of the file is lost": 1}
    assert not manifest["domains"]["web/b"]["quarantined"]
    torn_entry, cut_entry = map(
        json.loads, (prepared.folder / PREPARED_NAME / "quarantine.jsonl").read_text().splitlines()
    )
    assert (torn_entry["domain"], torn_entry["line"]) == ("web/a", 41)
    assert (cut_entry["domain"], cut_entry["detail"]) == ("web/a", "its zstd frame is cut off")


def test_corrupt_line_is_refused(tmp_path):
    """The reader runs here without its job, which reports such a line in the same way as a cut file."""
    write_documents(tmp_path / "one.jsonl", make_documents("one", 40))
    append_torn_line(tmp_path / "one.jsonl")
    spec = data_spec(tmp_path)
    [file] = find_files(spec)
    rows, limit = pa.Table.from_pylist([{"number": 0, **file._asdict()}]), QuarantineLimit(spec, [file])
    [table] = read_chunks(rows, spec=spec, limit=limit, quarantine=tmp_path, characters=CHUNK_CHARACTERS)
    chunk = DocumentChunk.from_table(table)
    assert chunk.is_aborted
    message = str(limit.error(chunk.tally))
    for part in ("one.jsonl line 41", "it is not JSON", "data.max_bad_lines"):
        assert part in message


@pytest.mark.ray
@pytest.mark.slow  # test_held_out.py tests check_not_empty, and tests/runs/test_runs.py tests has_weights
def test_run_without_a_step_is_mended_by_overrides(local_cluster, tmp_path):
    write_documents(tmp_path / "raw" / "a" / "one.jsonl", make_documents("one", 40))
    write_spec(tmp_path)
    result = mhmoe(tmp_path, "submit", "spec.yaml", "--set", "data.seq_len=100000")
    assert result.code == 9
    assert "no domain fills a single sample; shorten data.seq_len" in result.stderr
    assert "takes `--set KEY=VALUE`" in result.stderr
    overrides = ["--set", "data.seq_len=16", "--set", "train.steps=1"]
    assert mhmoe(tmp_path, "resume", *overrides).code == 0
    refused_result = mhmoe(tmp_path, "resume", "--until", "2", "--set", "train.lr=1")
    assert_one_line(refused_result, 3, "must go on exactly", "train.lr")


@pytest.mark.ray
def test_prepared_folder_may_have_any_name_and_leaves_no_files_beside_it(prepared):
    """The job's name, which is part of URLs, contains the folder's name."""
    folder = prepared.folder
    assert prepared.manifest["domains"].keys() == {"web/a", "web/b"}
    assert sorted(path.name for path in folder.glob("odd*")) == [PREPARED_NAME, OTHER_NAME]
    leftover_folder = folder / f"{PREPARED_NAME}.partial-01234567"
    leftover_folder.mkdir()
    assert mhmoe(folder, "data", "prepare", "spec.yaml", "--json").code == 0
    assert sorted(path.name for path in folder.glob("odd*")) == [PREPARED_NAME, OTHER_NAME]


@pytest.mark.ray
def test_prepared_data_of_other_settings_is_one_line(prepared):
    result = mhmoe(prepared.folder, "data", "prepare", "spec.yaml", "--set", "data.seq_len=8")
    assert_one_line(result, 4, "seq_len = 16, and the spec says 8", "data.prepared")


@pytest.mark.ray
def test_damaged_prepared_shard_fails_the_run(prepared):
    shard = next((prepared.folder / PREPARED_NAME / "train").rglob("*.arrow"))
    shard_bytes = shard.read_bytes()
    damaged_bytes = bytearray(shard_bytes)
    damaged_bytes[len(shard_bytes) // 2] ^= 1
    shard.write_bytes(damaged_bytes)
    result = mhmoe(prepared.folder, "submit", "spec.yaml")
    shard.write_bytes(shard_bytes)
    assert result.code == 9
    assert result.err.splitlines()[-1].startswith("error: run tiny-")
    assert "its content is not what was written" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", [SpecError, DataError, TokenError, RunError, CheckpointError, ServeError])
def test_error_in_a_jobs_log_keeps_its_class(kind, capsys):
    original_error = kind("task a: b", "it is not: there; or", "see `x`")
    with pytest.raises(SystemExit) as exit_info, logging_errors():
        raise original_error
    assert exit_info.value.code == kind.exit_code
    logged_error = logged(f"error: of others\n{capsys.readouterr().out}more\n")
    assert type(logged_error) is kind
    assert str(logged_error) == str(original_error)
    assert logged("error: of others\n") is None


def test_logged_error_of_an_unknown_exit_code_is_an_error_without_a_kind():
    logged_error = logged("error 99: my script: it stopped; ask me\n")
    assert type(logged_error) is MhmoeError
    assert str(logged_error) == "my script: it stopped; ask me"


def test_readme_lists_every_exit_code():
    def exit_codes(error_class):
        return {error_class.exit_code}.union(*(exit_codes(subclass) for subclass in error_class.__subclasses__()))

    readme = (Path(__file__).parents[2] / "mhmoe_ray/cli/README.md").read_text()
    listed_codes = {int(code) for code in re.findall(r"^\| (\d+) +\| ", readme, re.M)}
    assert listed_codes == exit_codes(MhmoeError) | {2, DOCTOR_EXIT_CODE}
