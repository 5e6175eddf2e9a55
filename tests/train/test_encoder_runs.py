"""Tests of runs that train an encoder on images: samples on any number of workers and after a kill, evaluation."""

import base64
import copy
import re

import httpx
import pytest
import yaml

from mhmoe_ray.runs import history, metrics
from tests.cli.run import mhmoe
from tests.support.encoders import ENCODER
from tests.support.images import make_images, tar_members, write_tar
from tests.support.watch import newest_run
from tests.train.image_runs import assert_a_kill_changes_nothing, assert_refused, streams, train_to_end

pytestmark = pytest.mark.long
STEPS = 12
TEXT_ALONE = ["--set", "data.sources.test.format=webdataset", "--set", "data.sources.test.columns=[text]"]


@pytest.fixture(scope="module")
def project(tmp_path_factory, local_cluster):
    """Return a project folder with images, whose first run prepares the data for all others."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures = make_images(120)
    write_tar(folder / "raw" / "train" / "00000.tar", tar_members(pictures[:90]))
    write_tar(folder / "raw" / "test" / "00000.tar", tar_members(pictures[90:]))
    return folder


def write_spec(folder, workers, **train):
    """Write a spec with three kinds of samples from the same images, and a matching part."""
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
    return train_to_end(folder)


@pytest.fixture(scope="module")
def run(project):
    """Return a finished run of two workers."""
    return train(project, 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_samples_and_losses_are_the_same_on_any_number_of_workers(project, run, workers):
    other_run = train(project, workers)
    assert streams(other_run) == streams(run)
    for line, expected in zip(history.read(other_run), history.read(run), strict=True):
        assert line[metrics.PART_LOSS] == pytest.approx(expected[metrics.PART_LOSS], rel=2e-3)


def test_parts_have_losses_of_their_own(run):
    assert len(set(streams(run))) == STEPS
    lines = history.read(run)
    validation = lines[-1][metrics.VAL_PART_LOSS]
    assert list(validation) == ["texts", "images", "pairs_image", "pairs_text", "match"]
    weights = {"pairs_image": 0.5, "pairs_text": 0.5}
    total = sum(weights.get(name, 1) * loss for name, loss in validation.items())
    assert lines[-1][metrics.VAL_LOSS] == pytest.approx(total, rel=1e-6)


@pytest.mark.slow  # test_vision_runs.py has the quick test of a kill
def test_a_killed_run_ends_as_an_undisturbed_one(project, run):
    write_spec(project, 2)
    assert_a_kill_changes_nothing(project, run)


def test_an_encoder_is_evaluated_on_held_out_samples_and_on_other_images(project, run):
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
def test_a_fine_tuned_encoder_is_evaluated_and_served(project, run, unused_port):
    path = "raw/train"
    tree = {
        "name": "fine",
        "storage": "runs",
        "start": {"from": run.id},
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
    fine_run = newest_run(project)
    figures = mhmoe(project, "eval", fine_run.id, "--json").json()["encoder"]
    assert figures["captions"].keys() == figures["retrieval"].keys() == {"matched/all", "named/all"}
    assert figures["image_values"] == {}
    deployed = mhmoe(project, "serve", "deploy", fine_run.id, "--name", "fine", "--set", f"serve.port={unused_port}")
    assert deployed.code == 0, deployed.err
    try:
        url = re.search(r" at (http://\S+)/v1/embeddings;", deployed.out)[1]
        image = "data:image/png;base64," + base64.b64encode(make_images(1)[0].image).decode()
        vectors = httpx.post(f"{url}/v1/embeddings", json={"input": [image, "an image"]}).json()["data"]
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
        pytest.param(["generate", "{run}", "--prompt", "a"], "it is an encoder", id="generate"),
        pytest.param(["ckpt", "export", "{run}", "--to", "exported"], "its model is an encoder", id="export"),
        pytest.param(
            ["eval", "{run}", "--tasks", "english"],
            "lm-eval's tasks are for decoders",
            id="tasks",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["eval", "{run}", "--text", "raw/test", *TEXT_ALONE],
            "it has no pairs of an image and a text",
            id="text",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_only_decoders_do_is_refused_in_one_line(project, run, arguments, error):
    assert_refused(project, [word.format(run=run.id) for word in arguments], error)


def test_plan_and_status_describe_an_encoder(project, run):
    write_spec(project, 2)
    plan = mhmoe(project, "plan", "spec.yaml").out
    assert "3 texts (masked), 2 images (masked), 4 pairs (masked), 3 match (contrastive)" in " ".join(plan.split())
    status = mhmoe(project, "status", run.id).out
    assert "sum over all parts" in status
    assert "perplexity" not in status
