"""Tests of `mhmoe data mix`, which needs only the manifest of prepared data, and no Ray."""

import json
from pathlib import Path

import pytest

from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.data.shards.recipe import recipe
from mhmoe_ray.spec import RunSpec, load_resolved_spec
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, mhmoe, mhmoe_subprocess
from tests.data.shards.manifests import T, make_manifest

SAMPLES = {"web/en": 5000, "web/de": 400, "web/sw": 12, "books/a": 300, "books/b": 10}
SOURCES = {
    "web": {"path": "web", "weight": 3, "alpha": 0, "max_epochs": 4},
    "books": {"path": "books", "weight": 1},
}
SCHEDULE = [{"from_step": 20, "sources": {"web": {"weight": 0}, "books": {"shares": {"a": 1}}}}]


@pytest.fixture
def project(tmp_path) -> Path:
    """Return a project folder with the manifest of prepared data and spec.yaml, of 30 steps with 8 samples each."""
    spec = load_resolved_spec(write_spec(tmp_path, data={"sources": SOURCES}))
    write_manifest(spec)
    return tmp_path


def write_manifest(spec: RunSpec) -> None:
    """Write a manifest with `SAMPLES` to the prepared folder of a spec, as if its data was prepared."""
    spec.data.prepared.mkdir()
    (spec.data.prepared / "manifest.json").write_text(make_manifest(SAMPLES, recipe(spec)).model_dump_json())


def test_mix_of_one_phase_has_all_figures(project):
    report = mhmoe(project, "data", "mix", "spec.yaml", "--json").json()
    [phase], total = report["phases"], report["whole"]
    assert sum(row["samples"] for row in total["domains"].values()) == 30 * 8
    assert total["sources"]["web"]["samples"] == 180
    assert total["domains"]["web/sw"] | {"tokens_there": 0} == {
        "share": 48 / 240,
        "samples": 48,
        "samples_there": 12,
        "samples_at_most": 48,
        "tokens_there": 0,
        "tokens": 48 * T,
        "epochs": 4,
    }
    assert phase["domains"]["web/sw"]["tempered"] == pytest.approx(0.25)
    assert phase["domains"]["web/sw"]["by_size"] == pytest.approx(0.75 * 12 / 5412, rel=0.01)
    text = mhmoe(project, "data", "mix", "spec.yaml").out
    row = next(line.split() for line in text.splitlines() if line.startswith("  sw "))
    assert row == ["sw", f"{12 * T + 1:,}", "12", "0.167", "25", "20", "48", "4.00", "4.00", "768"]
    assert "…" not in text


def test_padding_does_not_count_as_tokens(project):
    path = project / "prepared/manifest.json"
    manifest = DataManifest.model_validate_json(path.read_text())
    manifest.domains["web/sw"].padding = 12 * 4  # padding is 4 of the 16 tokens of each of 12 samples
    path.write_text(manifest.model_dump_json())
    figures = mhmoe(project, "data", "mix", "spec.yaml", "--json").json()["whole"]
    assert figures["domains"]["web/sw"]["tokens"] == 48 * 12
    assert figures["domains"]["web/de"]["tokens"] == figures["domains"]["web/de"]["samples"] * T
    tokens = sum(row["tokens"] for row in figures["sources"].values())
    assert tokens == 240 * T - 48 * 4
    assert f"240 samples, {tokens:,} tokens" in mhmoe(project, "data", "mix", "spec.yaml").out


def test_mix_of_two_phases_adds_up(project):
    set_ = ("--set", f"data.schedule={json.dumps(SCHEDULE)}")
    report = mhmoe(project, "data", "mix", "spec.yaml", *set_, "--json").json()
    first_phase, second_phase = report["phases"]
    assert (first_phase["from_step"], first_phase["steps"], second_phase["from_step"], second_phase["steps"]) == (
        0,
        20,
        20,
        10,
    )
    assert second_phase["domains"]["books/a"]["share"] == 1
    for name, row in report["whole"]["domains"].items():
        assert row["samples"] == sum(phase["domains"][name]["samples"] for phase in (first_phase, second_phase))
        assert row["epochs"] == row["samples"] / SAMPLES[name]
    lines = mhmoe(project, "data", "mix", "spec.yaml", *set_).out.splitlines()
    assert [line for line in lines if line.startswith(("from", "the whole"))] == [
        "from step 0, 20 steps, shares in per cent",
        "from step 20, 10 steps, shares in per cent",
        "the whole training",
    ]


def test_mix_writes_an_image(project):
    set_ = ("--set", f"data.schedule={json.dumps(SCHEDULE)}", "--png", "mix.png")
    assert "drawn in mix.png" in mhmoe(project, "data", "mix", "spec.yaml", *set_).out
    assert (project / "mix.png").read_bytes().startswith(b"\x89PNG")
    result = mhmoe(project, "data", "mix", "spec.yaml", "--png", "nowhere/mix.png")
    assert_one_line(result, 4, "image nowhere/mix.png", "No such file")


def test_image_without_matplotlib_is_one_line(project):
    (project / "matplotlib.py").write_text("raise ImportError")
    path = {"PYTHONPATH": f"{project}:{Path.cwd()}:{Path.cwd() / 'kernels'}"}
    result = mhmoe_subprocess(project, "data", "mix", "spec.yaml", "--png", "mix.png", **path)
    assert_one_line(result, 4, "matplotlib is missing", "pip install 'mhmoe-ray[plots]'")


def test_mistakes_are_one_line(project):
    def mix(*overrides):
        return mhmoe(project, "data", "mix", "spec.yaml", *(f"--set={o}" for o in overrides))

    assert_one_line(mix("data.prepared=elsewhere"), 4, "it is not there", "mhmoe data prepare SPEC")
    assert_one_line(mix("data.seq_len=8"), 4, "the spec says 8")
    result = mix("data.sources.books.max_epochs=0.1", "data.sources.web.max_epochs=0.001")
    assert_one_line(result, 4, "max_epochs allows 36 samples, and 240 are needed", "set train.steps to 4")
