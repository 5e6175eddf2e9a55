import shutil

import pytest
import torch

from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.serving.conftest import build_model


def test_loaded_model_equals_the_saved_one(checkpoint):
    model, _ = load_model(checkpoint)
    expected = dict(build_model().named_parameters())
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_expert_parallel_checkpoint_loads_as_the_same_model(checkpoint, expert_parallel_checkpoint):
    names = {p.name for p in (expert_parallel_checkpoint / "weights").iterdir()}
    assert len(names) == 2, "each rank writes its own slices"
    expected, loaded = (dict(load_model(c)[0].named_parameters()) for c in (checkpoint, expert_parallel_checkpoint))
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.fixture
def checkpoint_copy(checkpoint, tmp_path):
    """Return a checkpoint in a copy of its run that a test may damage."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent.parent, run)
    return run / "checkpoints" / checkpoint.name


def test_damaged_file_is_named_in_the_error(checkpoint_copy):
    weights = next((checkpoint_copy / "weights").iterdir())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=weights.name):
        load_answerer(checkpoint_copy, ServeSpec())


def test_changed_tokenizer_is_refused(checkpoint_copy):
    tokenizer = checkpoint_copy.parent.parent / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_answerer(checkpoint_copy, ServeSpec())


# The ignored warnings are about Ray's own models, which use what newer releases of pydantic deprecate.
@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
def test_invalid_chat_template_is_refused_before_replicas_start(checkpoint_copy):
    from ray.serve.exceptions import RayServeException

    from mhmoe_ray.serving.app import Args, build

    args = Args(checkpoint=str(checkpoint_copy), model="tiny", serve=ServeSpec())
    build(args)
    (checkpoint_copy.parent.parent / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(RayServeException, match=r"^the chat template: .*; correct chat_template\.jinja"):
        build(args)


def test_checkpoint_outside_its_run_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "loose" / "step")
    with pytest.raises(CheckpointError, match="inside its run directory"):
        load_answerer(tmp_path / "loose" / "step", ServeSpec())


def test_checkpoint_of_another_model_is_refused(checkpoint_copy):
    manifest = read_manifest(checkpoint_copy)
    model = manifest.model.model_copy(update={"layers": 4})
    (checkpoint_copy / "manifest.json").write_text(manifest.model_copy(update={"model": model}).model_dump_json())
    with pytest.raises(CheckpointError, match="is not in it"):
        load_answerer(checkpoint_copy, ServeSpec())
