"""Tests of encoders that start from another run, without Ray: fine-tuning begins with the weights of pre-training."""

import json

import pytest
import torch

from mhmoe_ray.checkpoint.huggingface.compare import open_model
from mhmoe_ray.checkpoint.load import load_for_inference
from mhmoe_ray.checkpoint.manifest import checkpoint_name, stored_manifest
from mhmoe_ray.checkpoint.start.source import find_start_model
from mhmoe_ray.checkpoint.start.write import write_start_checkpoint
from mhmoe_ray.errors import CheckpointError, SpecError
from mhmoe_ray.families.encoder.model import Encoder
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import copy_file
from tests.checkpoint.huggingface.conftest import TEXT
from tests.data.shards.manifests import make_manifest
from tests.support.encoders import ENCODER, QUESTIONS, encoder_spec, micro_batch_samples, stream_rows
from tests.support.llama_tokenizer import llama_tokenizer
from tests.support.ranks import run_ranks
from tests.support.runs import first_checkpoint, mark_submitted
from tests.support.saved import commit_checkpoint
from tests.support.specs import load_relative_spec
from tests.support.visions import vision_spec
from tests.train import jobs

MASKED_PARTS = {name: part for name, part in ENCODER["data"]["parts"].items() if name != "match"}
MASKED_SOURCES = {name: source for name, source in ENCODER["data"]["sources"].items() if name != "matched"}
MATCH_DATA = {
    "sources": {"matched": ENCODER["data"]["sources"]["matched"]},
    "parts": {"match": ENCODER["data"]["parts"]["match"]},
}

TRAIN = {**ENCODER["train"], "micro_batch_size": 3}


def train_and_save(spec: RunSpec, run, steps: int) -> None:
    """Train some steps from the checkpoint of step 0, if there is one, and save a checkpoint in the run directory."""
    trainer = jobs.build_trainer(spec)
    if spec.start is not None:
        checkpoint = first_checkpoint(run)
        jobs.restore(trainer, checkpoint, stored_manifest(checkpoint))
    m = spec.train.micro_batches
    for step in range(steps):
        rows = [stream_rows(micro_batch_samples(spec, number)) for number in range(step * m, (step + 1) * m)]
        trainer.update(trainer.accumulate([trainer.objective.receive(row)[1] for row in rows]))
    jobs.save_checkpoint(run, trainer)


def weights_of(checkpoint) -> dict[str, torch.Tensor]:
    return load_for_inference(Encoder(stored_manifest(checkpoint).model), checkpoint).named_tensors()


@pytest.fixture
def source(tmp_path):
    """Return a run that was pre-trained two steps, without a head for matching."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "manifest.json").write_text(make_manifest({"described": 50}).model_dump_json())
    llama_tokenizer(TEXT, 290).save(str(folder / "tokenizer.json"))
    spec = encoder_spec(
        storage=str(tmp_path / "runs"),
        model__encoder__d_match=None,
        data__prepared=str(folder),
        data__parts=MASKED_PARTS,
        data__sources=MASKED_SOURCES,
        train__micro_batch_size=9,
    )
    run = create_run(spec)
    mark_submitted(run)
    copy_file(folder / "tokenizer.json", run.tokenizer_file)
    run_ranks(1, train_and_save, spec, run, 2)
    return run


def resolve(folder, source, start=None, **sections) -> RunSpec:
    """Return the spec of a contrastive fine-tuning that starts from a run and changes only what it has to."""
    tree = {
        "name": "match",
        "storage": str(folder / "runs"),
        "start": {"from": source.id, **(start or {})},
        "model": {"encoder": {"d_match": 8}},
        "data": {**MATCH_DATA, "prepared": str(folder / "prepared")},
        "train": TRAIN,
        **sections,
    }
    (folder / "match.yaml").write_text(json.dumps(tree))
    return load_relative_spec(folder / "match.yaml").with_absolute_paths(folder)


ANSWER_SECTIONS = {
    "model": {"encoder": {"answers": 5, "compares": True}},
    "data": {
        "sources": {name: QUESTIONS["data__sources"][name] for name in ("questions", "sentences")},
        "parts": {name: QUESTIONS["data__parts"][name] for name in ("answer", "compare")},
    },
    "train": {**TRAIN, "micro_batch_size": 7},
}
HEAD_TENSORS = {
    "match": ["match.image.weight", "match.log_scale", "match.text.weight"],
    "answers": [
        f"{head}.{layer}.{kind}"
        for head, layers in (("answer", (0, 1, 3, 4, 6)), ("compare", (0, 1, 2, 4)))
        for layer in layers
        for kind in ("bias", "weight")
    ],
}


@pytest.mark.parametrize("head", HEAD_TENSORS)
def test_fine_tuning_starts_from_the_weights_of_masked_training(tmp_path, source, head):
    sections = {**ANSWER_SECTIONS, "data": {**ANSWER_SECTIONS["data"], "prepared": str(tmp_path / "prepared")}}
    spec = resolve(tmp_path, source, **(sections if head == "answers" else {}))
    assert spec.model.encoder.patch_size == source.spec().model.encoder.patch_size
    run = create_run(spec)
    mark_submitted(run)
    copy_file(spec.data.prepared / "tokenizer.json", run.tokenizer_file)
    write_start_checkpoint(run, spec)
    expected, weights = weights_of(first_checkpoint(source)), weights_of(first_checkpoint(run))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    fresh_model = build_model(spec.model)
    init_weights(fresh_model, spec.seed)
    new_names = sorted(weights.keys() - expected.keys())
    assert new_names == HEAD_TENSORS[head]
    assert all(torch.equal(weights[name], fresh_model.named_tensors()[name]) for name in new_names)


@pytest.mark.parametrize(("workers", "strategy"), [(1, "ddp"), (2, "fsdp")])
def test_matching_alone_trains_what_it_reads(tmp_path, source, workers, strategy):
    """The heads of masked training get zero gradients and do not change, because no tokens or patches are hidden."""
    cluster = {"workers": workers, "strategy": strategy}
    spec = resolve(tmp_path, source, cluster=cluster, train={**TRAIN, "weight_decay": 0.0})
    run = create_run(spec)
    mark_submitted(run)
    copy_file(spec.data.prepared / "tokenizer.json", run.tokenizer_file)
    write_start_checkpoint(run, spec)
    first_weights = weights_of(first_checkpoint(run))
    run_ranks(workers, train_and_save, spec, run, 2)
    last_weights = weights_of(sorted(run.checkpoints.iterdir())[-1])
    unchanged_names = {name for name in first_weights if torch.equal(first_weights[name], last_weights[name])}
    assert {"output.image.weight", "output.text.weight", "hidden_embedding.weight"} <= unchanged_names
    assert not {"patch_projection.weight", "embedding.weight", "match.text.weight"} & unchanged_names


@pytest.mark.parametrize(
    ("start", "sections", "message"),
    [
        ({"how": "upcycle"}, {}, "an encoder can only start from a copy"),
        ({"order": "continue"}, {}, "start.order continue is for decoders"),
        ({"optimizer": True}, {}, "d_match is new and has no state"),
        ({}, {"model": {"encoder": {"d_match": 8, "patch_size": 8}}}, "patch_size is 8 here and 4 there"),
    ],
)
def test_mistakes_are_named_before_a_job_starts(tmp_path, source, start, sections, message):
    with pytest.raises(SpecError, match=message):
        resolve(tmp_path, source, start, **sections)


def test_a_vision_model_is_no_start(tmp_path):
    spec = vision_spec().model_copy(update={"storage": tmp_path / "runs"})
    run = create_run(spec)
    mark_submitted(run)
    checkpoint = run.checkpoints / checkpoint_name(1, 1)
    (checkpoint / "weights").mkdir(parents=True)
    commit_checkpoint(checkpoint, spec.model)
    with pytest.raises(SpecError, match="it is a vision model, and start is for decoders and encoders; remove start"):
        find_start_model(str(run.path), spec.storage)


def test_encoders_are_not_compared(source):
    opened_model = open_model(sorted(source.checkpoints.iterdir())[-1])
    with pytest.raises(CheckpointError, match="its model is an encoder, and only decoders are compared"), opened_model:
        pass
