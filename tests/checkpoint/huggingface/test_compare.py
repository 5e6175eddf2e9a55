"""Tests of `mhmoe ckpt verify A B`: it finds planted faults, names them, and reports nothing for healthy pairs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhmoe_ray.checkpoint.huggingface.compare import compare_logits, compare_weights, open_model
from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.checkpoint.huggingface.conftest import DENSE, MODELS, edit_config, export_run, make_run
from tests.cli.run import mhmoe

pytestmark = pytest.mark.long

EXPERTS = "model.layers.1.block_sparse_moe.experts"


def checkpoint_of(run):
    return newest_checkpoint(run, ("weights",))[0]


def differences(first_model, second_model):
    with open_model(first_model) as a, open_model(second_model) as b:
        return compare_weights(a, b)


def logit_difference(first_model, second_model):
    with open_model(first_model) as a, open_model(second_model) as b:
        return compare_logits(a, b)


@pytest.mark.parametrize("kind", MODELS)
def test_healthy_pairs_have_no_difference(tmp_path, kind):
    """A run, its export, the run that is imported from the export, and the export of that run are the same model.

    The test compares all six pairs of the four.
    """
    first_run = make_run(tmp_path, MODELS[kind])
    export_run(first_run, tmp_path / "one")
    second_run = import_folder(tmp_path / "one", "again", tmp_path / "runs", None)
    export_run(second_run, tmp_path / "two")
    locations = [checkpoint_of(first_run), tmp_path / "one", checkpoint_of(second_run), tmp_path / "two"]
    for i, first_model in enumerate(locations):
        for second_model in locations[i + 1 :]:
            assert differences(first_model, second_model) == []
            assert logit_difference(first_model, second_model) == (0.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    export_run(make_run(folder, MODELS["llama"]), folder / "whole")
    return folder


def edited(folders, tmp_path, edit):
    """Return a copy of the exported folder in which `edit` has changed the tensors of all files."""
    folder = tmp_path / "edited"
    shutil.copytree(folders / "whole", folder)
    files = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    tensors = {name: t for content in files.values() for name, t in content.items()}
    edit(tensors)
    for path, content in files.items():
        save_file({name: tensors[name].contiguous() for name in content if name in tensors}, path)
    return folder


def swap_experts(tensors):
    for part in ("w1", "w2", "w3"):
        names = [f"{EXPERTS}.{e}.{part}.weight" for e in (0, 2)]
        tensors[names[0]], tensors[names[1]] = (tensors[name].clone() for name in reversed(names))


def zero_expert(tensors):
    for part in ("w1", "w2", "w3"):
        tensors[f"{EXPERTS}.3.{part}.weight"].zero_()


def transpose_projection(tensors):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.clone()


def round_all(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.bfloat16)


def change_a_value(tensors):
    tensors["model.norm.weight"][3] += 0.5


def remove_a_tensor(tensors):
    del tensors["model.norm.weight"]


FAULTS = {
    "swapped experts": (
        swap_experts,
        [("swapped", f"{EXPERTS}.0", "it is expert 2 of the second"), ("swapped", f"{EXPERTS}.2", "it is expert 0")],
    ),
    "a zeroed expert": (zero_expert, [("zero", f"{EXPERTS}.3", "all of it is zero in the second")]),
    "a transposed projection": (
        transpose_projection,
        [("transposed", "model.layers.0.self_attn.o_proj.weight", "one is the transpose")],
    ),
    "a changed value": (change_a_value, [("different", "model.norm.weight", "largest difference 0.5")]),
    "a missing tensor": (remove_a_tensor, [("missing", "model.norm.weight", "it is not in folder")]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named(folders, tmp_path, fault):
    edit, expected = FAULTS[fault]
    folder = edited(folders, tmp_path, edit)
    findings = differences(folders / "whole", folder)
    assert [(f.kind, f.subject) for f in findings] == [(kind, subject) for kind, subject, _ in expected]
    for finding, (_, _, detail) in zip(findings, expected, strict=True):
        assert detail in finding.detail
    if fault == "a missing tensor":
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
            logit_difference(folders / "whole", folder)
    else:
        assert logit_difference(folders / "whole", folder).largest > 1e-3


def test_pure_rounding_is_told_from_damage(folders, tmp_path):
    folder = edited(folders, tmp_path, round_all)
    findings = differences(folders / "whole", folder)
    assert findings
    assert all(finding.is_rounding for finding in findings)
    assert 0 < logit_difference(folders / "whole", folder).largest < 1


def test_changed_option_is_named(folders, tmp_path):
    folder = edited(folders, tmp_path, lambda tensors: None)
    fields = json.loads((folder / "config.json").read_text())
    del fields["mhmoe"]
    (folder / "config.json").write_text(json.dumps(fields))
    edit_config(norm_topk_prob=True)(folder)
    assert differences(folders / "whole", folder) == [("model", "model.moe.normalize_gates", "False and True")]


def test_command_compares_a_run_with_folders(folders, tmp_path):
    run = next((folders / "runs").iterdir())
    whole_result = mhmoe(tmp_path, "ckpt", "verify", str(run), str(folders / "whole"))
    assert (whole_result.code, whole_result.out.splitlines()[0]) == (0, "all tensors are equal")
    assert (
        whole_result.out.splitlines()[1]
        == "logits: largest difference 0; 100.0% of the most likely tokens are the same"
    )
    rounded = edited(folders, tmp_path, round_all)
    answer = mhmoe(tmp_path, "ckpt", "verify", str(run), str(rounded))
    assert answer.code == 0
    assert answer.out.startswith("rounded: ")
    shutil.rmtree(rounded)
    swapped = edited(folders, tmp_path, swap_experts)
    answer = mhmoe(tmp_path, "ckpt", "verify", str(folders / "whole"), str(swapped), "--json")
    assert answer.code == 8
    assert f"{folders / 'whole'}: it differs from {swapped} in 2 places" in answer.err
    printed = json.loads(answer.out)
    assert [finding["kind"] for finding in printed["findings"]] == ["swapped", "swapped"]
    assert printed["logits"]["largest"] > 0


def test_run_can_be_imported_as_a_copy(folders, tmp_path):
    run = next((folders / "runs").iterdir())
    answer = mhmoe(tmp_path, "ckpt", "import", str(run), "--name", "copy")
    assert answer.code == 0, answer.err
    copy = next((tmp_path / "runs").glob("copy-*"))
    [event] = events.read(RunDir(copy))
    assert event["source"] == str(checkpoint_of(RunDir(run)))
    answer = mhmoe(tmp_path, "ckpt", "verify", str(run), str(copy))
    assert answer.out.startswith("all tensors are equal\n")


def test_models_without_logits_of_text_alone_are_told(tmp_path):
    """Router `domain` computes logits only for tokens of a known domain, so the logits are not compared."""
    moe = MoESpec(router="domain", top_k=1, heads=1, d_expert=24, experts=2, domains=["a", "b"])
    run = make_run(tmp_path, ModelSpec(**DENSE, moe=moe))
    assert differences(checkpoint_of(run), checkpoint_of(run)) == []
    assert logit_difference(checkpoint_of(run), checkpoint_of(run)) is None
