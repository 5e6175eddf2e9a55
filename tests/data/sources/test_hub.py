"""Tests of data sets of the hub that are in the hub's cache, without a network."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

REVISION = "0123456789abcdef0123456789abcdef01234567"
READ_SOURCE = """
import json, sys
from mhmoe_ray.data.sources import FileReader, find_files
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec
spec = DataSpec.model_validate({"sources": {"hub": {"path": sys.argv[1]}}, "prepared": "prepared", "seq_len": 8})
try:
    files = find_files(spec)
    documents = [item.text for file in files for item in FileReader(file, spec)]
    print(json.dumps([[file.domain, file.path, file.size, file.format] for file in files]))
    print(json.dumps(documents))
except DataError as e:
    print(e)
"""


@pytest.fixture
def hub_cache(tmp_path):
    """Return a cache of the hub with one data set, which has Parquet files below two folders."""
    folder = tmp_path / "hub" / "datasets--org--texts"
    snapshot = folder / "snapshots" / REVISION
    for name, texts in {"de": ["eins", "zwei"], "en": ["one"]}.items():
        (snapshot / name).mkdir(parents=True)
        pyarrow.parquet.write_table(pa.table({"text": texts}), snapshot / name / "train-00000.parquet")
    (snapshot / "README.md").write_text("# Texts")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    return tmp_path


def read_source(cache, path):
    """Return the lines that a process prints which reads a source without a network."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ_SOURCE, path]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("revision", ["main", REVISION])
def test_a_data_set_in_the_cache_of_the_hub_is_read(hub_cache, revision):
    path = f"hf://datasets/org/texts@{revision}"
    files, documents = map(json.loads, read_source(hub_cache, path))
    assert [file[:2] + file[3:] for file in files] == [
        [f"hub/{language}", f"{path}/{language}/train-00000.parquet", "parquet"] for language in ("de", "en")
    ]
    assert documents == ["eins", "zwei", "one"]


def test_a_pattern_selects_files_of_a_data_set(hub_cache):
    _, documents = read_source(hub_cache, "hf://datasets/org/texts@main/en/*.parquet")
    assert json.loads(documents) == ["one"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://datasets/org/texts", "names no data set with its revision: write datasets/ORGANIZATION/NAME@REVISION"),
        ("hf://datasets/org/others@main", "the hub cannot be reached, and its cache has no such data set"),
        ("hf://models/org/texts@main", "it is no data set of the hub: write hf://datasets/"),
        ("hf://datasets/org/texts@main/fr", "there is no file or folder hf://datasets/org/texts@main/fr"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_line(hub_cache, path, message):
    [line] = read_source(hub_cache, path)
    assert message in line
