"""Tests of runs that train an encoder on pictures: samples on any number of workers and after a kill, evaluation."""

import base64
import copy
import re

import httpx
import pytest
import yaml

from mhmoe_ray.checkpoint.manifest import committed_checkpoints, read_manifest
from mhmoe_ray.runs import history, metrics
from tests.cli.run import mhmoe
from tests.data.pictures import make_pictures, tar_members, write_tar
from tests.encoders import ENCODER
from tests.faults import harness
from tests.watch import newest_run, start_events, wait_for_end

pytestmark = pytest.mark.long
STEPS = 12
TEXT_ALONE = ["--set", "data.sources.test.format=webdataset", "--set", "data.sources.test.columns=[text]"]


@pytest.fixture(scope="module")
def project(tmp_path_factory, local_cluster):
    """Return a project folder with pictures, whose first run prepares the data for all others."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures = make_pictures(120)
    write_tar(folder / "raw" / "train" / "00000.tar", tar_members(pictures[:90]))
    write_tar(folder / "raw" / "test" / "00000.tar", tar_members(pictures[90:]))
    return folder


def write_spec(folder, workers, **train):
    """Write a spec with three kinds of samples from the same pictures, and a matching part."""
    tree = copy.deepcopy(ENCODER)
    path = "raw/train"
    tree["storage"] = "runs"
    tree["data"] |= {"prepared": "prepared", "validation_fraction": 0.2}
    tree["data"]["sources"] = {
        "captions": {"path": path, "format": "webdataset", "columns": ["text"]},
        "pictures": {"path": path, "format": "webdataset", "columns": ["image"]},
        "described": {"path": path, "format": "webdataset"},
        "matched": {"path": path, "format": "webdataset"},
    }
    tree["train"] |= {"steps": STEPS, "validate_every": 6, "checkpoint_every": 2, **train}
    tree["cluster"] = {"workers": workers, "ep": min(2, workers)}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def train(folder, workers):
    """Train a run on some number of workers to its end, and return it."""
    write_spec(folder, workers)
    result = mhmoe(folder, "submit", "spec.yaml")
    assert result.code == 0, result.err
    return newest_run(folder)


@pytest.fixture(scope="module")
def runs(project):
    """Return a finished run of one worker and one of two."""
    return {workers: train(project, workers) for workers in (1, 2)}


def streams(run):
    return [line[metrics.STREAM] for line in history.read(run)]


def test_crops_and_masks_are_the_same_on_any_number_of_workers(runs):
    expected = streams(runs[1])
    assert len(set(expected)) == STEPS
    assert streams(runs[2]) == expected


@pytest.mark.slow
def test_four_workers_have_the_samples_and_losses_of_one(project, runs):
    run = train(project, 4)
    assert streams(run) == streams(runs[1])
    assert_losses_are_those_of(run, runs[1])


def assert_losses_are_those_of(run, expected_run):
    for line, expected in zip(history.read(run), history.read(expected_run), strict=True):
        assert line[metrics.PART_LOSS] == pytest.approx(expected[metrics.PART_LOSS], rel=2e-3)


def test_losses_are_the_same_on_any_number_of_workers(runs):
    assert_losses_are_those_of(runs[2], runs[1])
    lines = history.read(runs[1])
    validation = lines[-1][metrics.VAL_PART_LOSS]
    assert list(validation) == ["texts", "images", "pairs_image", "pairs_text", "match"]
    weights = {"pairs_image": 0.5, "pairs_text": 0.5}
    total = sum(weights.get(name, 1) * loss for name, loss in validation.items())
    assert lines[-1][metrics.VAL_LOSS] == pytest.approx(total, rel=1e-6)


def test_a_killed_run_ends_as_an_undisturbed_one(project, runs):
    write_spec(project, 2)
    run = harness.submit(project)
    [worker, _] = harness.workers_of_start(run, 1)
    assert harness.kill(worker["pid"])
    wait_for_end(run)
    assert len(start_events(run)) == 2
    assert streams(run) == streams(runs[2])
    assert [line[metrics.LOSS] for line in history.read(run)] == [line[metrics.LOSS] for line in history.read(runs[2])]
    killed, undisturbed = (read_manifest(committed_checkpoints(r)[-1]) for r in (run, runs[2]))
    assert killed.files == undisturbed.files


def test_an_encoder_is_evaluated_on_held_out_samples_and_on_other_pictures(project, runs):
    run = runs[2]
    held_out = mhmoe(project, "eval", run.id, "--json").json()
    validation = history.read(run)[-1][metrics.VAL_PART_LOSS]
    losses = {name: score["loss"] for name, score in held_out["encoder"]["losses"].items()}
    assert losses == pytest.approx(validation, rel=1e-4)
    assert held_out["figures"]["image_values"].keys() == {"described/all", "matched/all"}
    retrieval = held_out["encoder"]["retrieval"]["matched/all"]
    for score in (retrieval["model"], retrieval["baseline"]):
        assert score["images"] == score["captions"] > 1
        assert 0 <= score["image_to_text"]["at_1"] <= score["image_to_text"]["at_10"] <= 1
    # The evaluation has counted the routes, too, of images and of texts.
    routing = mhmoe(project, "routing", run.id, "--json").json()
    assert routing["domains"].keys() == {
        f"{domain}/all {modality}" for domain in ("described", "matched") for modality in ("images", "texts")
    }
    images = routing["domains"]["described/all images"]
    assert images["tokens"] % 17 == 0
    assert len(images["load"]) == 1
    assert sum(images["load"][0]) == pytest.approx(4)
    result = mhmoe(
        project, "eval", run.id, "--text", "raw/test", "--set", "data.sources.test.format=webdataset", "--json"
    )
    [(domain, value)] = result.json()["figures"]["image_values"].items()
    assert (domain, value["pairs"]) == ("test/all", 30)
    assert value["over_no_image"] == pytest.approx(value["no_image"] - value["own_image"])
    assert value["own_image"] != value["other_image"] != value["no_image"]


@pytest.mark.slow
def test_a_fine_tuned_encoder_is_evaluated_and_served(project, runs, unused_port):
    path = "raw/train"
    tree = {
        "name": "fine",
        "storage": "runs",
        "start": {"from": runs[2].id},
        "data": {
            "sources": {name: {"path": path, "format": "webdataset"} for name in ("matched", "named")},
            "parts": {
                "match": {"sources": ["matched"], "micro_batch_size": 8, "objective": "contrastive"},
                "names": {"sources": ["named"], "micro_batch_size": 4, "objective": "caption"},
            },
            "prepared": "fine",
            "validation_fraction": 0.2,
        },
        "train": {**ENCODER["train"], "steps": 6, "validate_every": 3, "checkpoint_every": 6},
        "cluster": {"workers": 2, "ep": 2},
    }
    (project / "fine.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    result = mhmoe(project, "submit", "fine.yaml")
    assert result.code == 0, result.err
    run = newest_run(project)
    figures = mhmoe(project, "eval", run.id, "--json").json()["encoder"]
    assert figures["captions"].keys() == figures["retrieval"].keys() == {"matched/all", "named/all"}
    assert figures["image_values"] == {}
    deployed = mhmoe(project, "serve", "deploy", run.id, "--name", "fine", "--set", f"serve.port={unused_port}")
    assert deployed.code == 0, deployed.err
    try:
        url = re.search(r" at (http://\S+)/v1/embeddings;", deployed.out)[1]
        image = "data:image/png;base64," + base64.b64encode(make_pictures(1)[0].image).decode()
        vectors = httpx.post(f"{url}/v1/embeddings", json={"input": [image, "a picture"]}).json()["data"]
        assert len(vectors) == 2
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]
        caption = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages}).json()
        assert isinstance(caption["choices"][0]["message"]["content"], str)
        assert httpx.get(f"{url}/names").json()["names"]
    finally:
        assert mhmoe(project, "serve", "down", "fine").code == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["generate", "{run}", "--prompt", "a"], "it is an encoder"),
        (["ckpt", "export", "{run}", "--to", "exported"], "its model is an encoder"),
        (["eval", "{run}", "--tasks", "english"], "lm-eval's tasks are for decoders"),
        (["eval", "{run}", "--text", "raw/test", *TEXT_ALONE], "it has no pairs of an image and a text"),
    ],
    ids=["generate", "export", "tasks", "text"],
)
def test_what_only_decoders_do_is_refused_in_one_line(project, runs, arguments, error):
    words = [word.format(run=runs[2].id) for word in arguments]
    result = mhmoe(project, *words)
    assert result.code != 0
    assert error in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_plan_and_status_describe_an_encoder(project, runs):
    write_spec(project, 2)
    plan = mhmoe(project, "plan", "spec.yaml").out
    assert "3 texts (masked), 2 images (masked), 4 pairs (masked), 3 match (contrastive)" in " ".join(plan.split())
    status = mhmoe(project, "status", runs[2].id).out
    assert "of all parts" in status
    assert "perplexity" not in status
