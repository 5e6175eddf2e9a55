"""Tests of models of the Hugging Face hub, which are read from a cache without any network."""

import json
import shutil

import pytest

from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import find_run
from tests.checkpoint.huggingface.conftest import MIXTRAL, export_run, make_run
from tests.checkpoint.huggingface.test_import import edit_config
from tests.cli.run import assert_one_line, mhmoe_subprocess

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """Return a folder with the hub's cache, which has the export of a run as the model lab/Small.Model."""
    model = tmp_path / "hub" / "models--lab--Small.Model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    (model / "snapshots").mkdir()
    export_run(make_run(tmp_path / "source", MIXTRAL), model / "snapshots" / REVISION)
    return tmp_path / "hub"


def offline(tmp_path, cache, *words, **env):
    """Run `mhmoe ckpt` with these words, a cache of the hub and no network."""
    # The client reads these variables when it is imported, so each command has a process of its own.
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", **env}
    return mhmoe_subprocess(tmp_path, "ckpt", *words, **environment)


def test_model_of_the_hub_is_imported_from_the_cache(tmp_path, cache):
    for source in ("hf:lab/Small.Model", f"hf:lab/Small.Model@{REVISION}"):
        answer = offline(tmp_path, cache, "import", source)
        assert answer.code == 0, answer.err
        run = find_run(None, tmp_path / "runs")
        assert run.id.startswith("small-model-")
        [event] = events.read(run)
        assert event["model_type"] == "mixtral"
        shutil.rmtree(run.path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf:lab/other", "hf:lab/other: the hub cannot be reached, and its cache has no such model"),
        ("hf:lab/Small.Model@none", "hf:lab/Small.Model@none: the hub cannot be reached, and its cache has no such"),
        ("hf:a/b/c", "hf:a/b/c: it is no name of a model of the hub; write hf:ORGANIZATION/NAME"),
    ],
)
def test_name_that_is_not_in_the_cache_is_refused(tmp_path, cache, source, reason):
    answer = offline(tmp_path, cache, "import", source)
    assert_one_line(answer, 8, reason)
    assert not (tmp_path / "runs").exists()


def test_hub_that_cannot_be_reached_is_named(tmp_path, cache):
    answer = offline(tmp_path, cache, "import", "hf:lab/other", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert_one_line(answer, 8, "hf:lab/other: the hub cannot be reached")


def test_unknown_architecture_is_refused_before_the_weights_are_needed(tmp_path, cache):
    folder = next((cache / "models--lab--Small.Model" / "snapshots").iterdir())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    edit_config(model_type="gpt2")(folder)
    answer = offline(tmp_path, cache, "import", "hf:lab/Small.Model")
    assert_one_line(answer, 8, "its model_type is gpt2; import one of llama")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"


def test_models_of_the_hub_can_be_compared(tmp_path, cache):
    run = next((tmp_path / "source" / "runs").iterdir())
    answer = offline(tmp_path, cache, "verify", str(run), "hf:lab/Small.Model")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("all tensors are equal\n")
