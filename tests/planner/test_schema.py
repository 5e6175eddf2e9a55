"""Tests of the JSON schemas: they accept every file of jobs/ and refuse files that the loader refuses."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from mhmoe_ray.planner.schema import spec_schema, sweep_schema

FILES = sorted(Path("jobs").rglob("*.yaml"))
SCHEMAS = {"spec": spec_schema(), "sweep": sweep_schema()}


def kind_of(tree) -> str:
    """Return the key of `SCHEMAS` for a file's content."""
    return "sweep" if "sizes" in tree else "spec"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_of_jobs_fits_its_schema_and_names_it(file):
    tree = yaml.safe_load(file.read_text())
    jsonschema.validate(tree, SCHEMAS[kind_of(tree)])
    first_line = file.read_text().splitlines()[0]
    assert first_line.startswith("# yaml-language-server: $schema=")
    assert json.loads((file.parent / first_line.partition("=")[2]).read_text()) == SCHEMAS[kind_of(tree)]


@pytest.mark.parametrize(
    "change",
    [
        {"modle": {}},
        {"train": {"learning_rate": 1}},
        {"train": {"steps": "many"}},
        {"model": {"backbone": "mistral"}},
        {"cluster": {"workers": 0}},
        {"data": {"sources": {}}},
    ],
)
def test_a_mistake_is_refused(change):
    tree = yaml.safe_load(Path("jobs/quickstart.yaml").read_text())
    for key, value in change.items():
        tree[key] = {**tree.get(key, {}), **value}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, SCHEMAS["spec"])


def test_a_preset_or_a_start_takes_the_place_of_a_model():
    tree = yaml.safe_load(Path("jobs/quickstart.yaml").read_text())
    short = {"name": "a", "preset": "mhmoe", "size": "tiny", "data": tree["data"]}
    jsonschema.validate(short, SCHEMAS["spec"])
    start = {"name": "a", "start": {"from": "quickstart"}, "train": {"steps": 1}, "data": tree["data"]}
    jsonschema.validate(start, SCHEMAS["spec"])
    del short["preset"], short["size"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(short, SCHEMAS["spec"])
