"""Tests of models of the Hugging Face hub, which are read from a cache without any network."""

import huggingface_hub.constants
import pytest

from mhmoe_ray.checkpoint.huggingface.hub import local_folder
from mhmoe_ray.cli.ckpt import verify
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import find_run
from tests.checkpoint.huggingface.conftest import MIXTRAL, edit_config, export_run, make_run
from tests.cli.run import mhmoe_subprocess

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


@pytest.fixture
def offline(cache, monkeypatch):
    """Let the hub's client of this process read nothing but the cache."""
    # The client reads the environment when it is imported, so the values are set in its module.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_model_of_the_hub_is_imported_from_the_cache(tmp_path, cache):
    answer = mhmoe_subprocess(
        tmp_path, "ckpt", "import", "hf:lab/Small.Model", HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1"
    )
    assert answer.code == 0, answer.err
    run = find_run(None, tmp_path / "runs")
    assert run.id.startswith("small-model-")
    [event] = events.read(run)
    assert (event["model_type"], event["source"]) == ("mixtral", "hf:lab/Small.Model")


def test_revision_of_a_model_is_read_from_the_cache(cache, offline):
    folder = cache / "models--lab--Small.Model" / "snapshots" / REVISION
    assert local_folder(f"hf:lab/Small.Model@{REVISION}") == local_folder("hf:lab/Small.Model") == folder


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf:lab/other", "hf:lab/other: the hub cannot be reached, and its cache has no such model"),
        ("hf:lab/Small.Model@none", "hf:lab/Small.Model@none: the hub cannot be reached, and its cache has no such"),
        ("hf:a/b/c", "hf:a/b/c: it is no name of a model of the hub; write hf:ORGANIZATION/NAME"),
    ],
)
def test_name_that_is_not_in_the_cache_is_refused(offline, source, reason):
    with pytest.raises(CheckpointError, match=reason):
        local_folder(source)


def test_hub_that_cannot_be_reached_is_named(offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="hf:lab/other: the hub cannot be reached"):
        local_folder("hf:lab/other")


def test_unknown_architecture_is_refused_before_the_weights_are_needed(cache, offline):
    folder = next((cache / "models--lab--Small.Model" / "snapshots").iterdir())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    edit_config(model_type="gpt2")(folder)
    with pytest.raises(CheckpointError, match="its model_type is gpt2; import one of llama"):
        local_folder("hf:lab/Small.Model")


def test_models_of_the_hub_can_be_compared(tmp_path, offline, capsys):
    run = next((tmp_path / "source" / "runs").iterdir())
    verify(str(run), "hf:lab/Small.Model")
    assert capsys.readouterr().out.startswith("all tensors are equal\n")
