"""Tests of the checkpoint of step 0, without Ray: what it holds, and how training goes on from it."""

from pathlib import Path

import pytest
import torch

from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
from mhmoe_ray.checkpoint.load import load_model
from mhmoe_ray.checkpoint.manifest import newest_checkpoint, stored_manifest
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.checkpoint.start.resolve import build_spec
from mhmoe_ray.checkpoint.start.source import find_start_model
from mhmoe_ray.checkpoint.start.write import write_start_checkpoint
from mhmoe_ray.errors import CheckpointError, RunError, SpecError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.spec import RunSpec, dump_spec
from mhmoe_ray.storage import ObjectPath
from tests.checkpoint.huggingface.conftest import export_run
from tests.data.shards.manifests import make_manifest
from tests.support.llama_tokenizer import llama_tokenizer
from tests.support.ranks import run_ranks
from tests.support.runs import first_checkpoint
from tests.support.specs import tiny_spec
from tests.support.starts import DENSE, TRAIN, make_source, start_run
from tests.train import jobs

TOKENS = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_model(checkpoint)[0].named_tensors()


def test_a_copy_has_the_weights_and_a_record_of_its_ancestors(tmp_path):
    source = make_source(tmp_path)
    run = start_run(tmp_path, source.id, {})
    checkpoint = first_checkpoint(run)
    assert checkpoint.name == "step_00000000.0"
    manifest, source_manifest = stored_manifest(checkpoint), stored_manifest(first_checkpoint(source))
    assert (manifest.step, manifest.position, manifest.tokens, manifest.updates) == (0, 0, 0, 0)
    assert manifest.model == source_manifest.model
    expected, weights = weights_of(first_checkpoint(source)), weights_of(checkpoint)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    record = read_start(run)
    assert [(a.name, a.step, a.tokens) for a in record.ancestors] == [(source.id, 4, source_manifest.tokens)]
    assert events.newest_event(events.read(run), "initialized")["name"] == checkpoint.name
    branch = start_run(tmp_path, run.id, {})
    lines = list(read_start(branch).lines())
    assert lines[0].startswith(f"copied from {run.id}, step 0, {source_manifest.tokens:,} tokens")
    assert lines[1] == f"  copied from {source.id}, step 4, {source_manifest.tokens:,} tokens"


def continue_training(spec: RunSpec, source: Path, branch: RunDir) -> tuple[dict, dict, int]:
    """Return the states of a run and of its branch after four steps on the same samples, and the branch's updates.

    The states have weights and moments. The updates are the number that the branch's newest checkpoint records.
    """
    trainer, branch_trainer = jobs.build_trainer(spec), jobs.build_trainer(branch.spec())
    jobs.restore(trainer, source, stored_manifest(source))
    start = first_checkpoint(branch)
    jobs.restore(branch_trainer, start, stored_manifest(start))
    for step in range(4, 8):
        trainer.update(trainer.accumulate(jobs.rank_batches(spec, step, trainer)))
        branch_trainer.update(branch_trainer.accumulate(jobs.rank_batches(spec, step, branch_trainer)))
    saver = Saver(branch, branch_trainer, 1)
    saver.save(branch_trainer.zero_counts())
    saver.wait()
    states = [
        {**jobs.full_tensors(t.strategy.checkpoint_weights()), **jobs.full_tensors(t.strategy.checkpoint_moments())}
        for t in (trainer, branch_trainer)
    ]
    return states[0], states[1], newest_checkpoint(branch).manifest.updates


@pytest.mark.parametrize("world", [1, 2])
def test_a_branch_with_the_optimizer_trains_as_the_run_would_have(tmp_path, world):
    """A branch with any number of workers continues the count of updates, on which Adam's bias correction depends."""
    source = make_source(tmp_path)
    run = start_run(tmp_path, source.id, {"optimizer": True}, cluster={"workers": world})
    spec = source.spec().with_workers(world)
    results = run_ranks(world, continue_training, spec, first_checkpoint(source), run)
    for expected, actual, updates in results:
        assert updates == 8
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def logits(checkpoint: Path) -> torch.Tensor:
    return load_model(checkpoint)[0](TOKENS).logits_BTV


def trained_logits(spec: RunSpec, checkpoint: Path) -> torch.Tensor:
    """Return the logits of a trainer that is restored from a checkpoint, at the world size of the current process."""
    trainer = jobs.build_trainer(spec)
    jobs.restore(trainer, checkpoint, stored_manifest(checkpoint))
    with torch.no_grad():
        return trainer.model(TOKENS).logits_BTV


@pytest.mark.parametrize(
    "moe",
    [
        {"heads": 1, "experts": 4, "every": 1},
        {"heads": 4, "experts": 4, "d_expert": 16},
    ],
)
@pytest.mark.parametrize("ep", [1, 2])
def test_an_upcycled_run_begins_with_the_logits_of_its_start(tmp_path, moe, ep):
    """The user sets only keys of the experts; the trunk and the keys that keep the logits equal come from the start."""
    source = make_source(tmp_path)
    model = {"moe": moe}
    run = start_run(tmp_path, source.id, {"how": "upcycle"}, model=model, cluster={"workers": ep, "ep": ep})
    expected = logits(first_checkpoint(source))
    torch.testing.assert_close(logits(first_checkpoint(run)), expected, rtol=0, atol=1e-5)
    for actual in run_ranks(ep, trained_logits, run.spec(), first_checkpoint(run)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_mixture_from_another_tool_is_upcycled_to_several_heads(tmp_path):
    """The user gives only the number of heads; the folder has the layout and the names of Mixtral."""
    moe = {"heads": 1, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1, "normalize_gates": True}
    source = make_source(tmp_path, model={**DENSE, "d_ff": None, "moe": moe})
    folder = tmp_path / "model"
    assert export_run(source, folder).model_type == "mixtral"
    run = start_run(tmp_path, str(folder), {"how": "upcycle"}, model={"moe": {"heads": 2}})
    expected = logits(first_checkpoint(source))
    torch.testing.assert_close(logits(first_checkpoint(run)), expected, rtol=0, atol=1e-5)
    assert run.spec().model.moe.d_sub_token == run.spec().model.d_model


def test_a_run_starts_from_a_folder_of_another_tool_and_from_an_import(tmp_path):
    source = make_source(tmp_path)
    (source.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    folder = tmp_path / "model"
    export_run(source, folder)
    imported = import_folder(folder, "imported", tmp_path / "runs", None)
    expected = weights_of(first_checkpoint(source))
    for start in (str(folder), imported.id, str(first_checkpoint(source)), f"{source.id}@4"):
        run = start_run(tmp_path, start, {}, data={**data_section(tmp_path), "seq_len": 8})
        weights = weights_of(first_checkpoint(run))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert run.chat_template_file.read_text() == "{{ messages[0].content }}"


def data_section(folder: Path) -> dict:
    return {"sources": {"web": {"path": "raw"}}, "prepared": str(folder / "prepared")}


def test_an_interrupted_start_is_written_again_and_a_finished_one_stays(tmp_path):
    source = make_source(tmp_path)
    run = start_run(tmp_path, source.id, {})
    checkpoint = first_checkpoint(run)
    manifest = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").unlink()
    write_start_checkpoint(run, run.spec())
    assert (checkpoint / "manifest.json").read_text() == manifest
    time_of_manifest = (checkpoint / "manifest.json").stat().st_mtime_ns
    write_start_checkpoint(run, run.spec())
    assert (checkpoint / "manifest.json").stat().st_mtime_ns == time_of_manifest


def test_a_damaged_checkpoint_is_no_start(tmp_path):
    source = make_source(tmp_path)
    [file] = (first_checkpoint(source) / "weights").glob("*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not have the hash"):
        start_run(tmp_path, source.id, {})


def test_mistakes_are_named_before_a_job_starts(tmp_path):
    source = make_source(tmp_path)
    with pytest.raises(RunError, match="there is no such folder, and as a run"):
        start_run(tmp_path, "nothing", {})
    with pytest.raises(CheckpointError, match="no checkpoint of this step; choose from step_00000004"):
        start_run(tmp_path, f"{source.id}@5", {})
    with pytest.raises(SpecError, match="how: mix needs a list"):
        start_run(tmp_path, source.id, {"how": "mix"})
    with pytest.raises(SpecError, match="moments fit copied weights only"):
        start_run(tmp_path, source.id, {"how": "upcycle", "optimizer": True})
    with pytest.raises(SpecError, match=r"unknown key 'start\.form'; did you mean 'from'"):
        start_run(tmp_path, source.id, {"form": "x"})
    imported = RunDir(tmp_path / "runs" / import_exported(source, tmp_path))
    with pytest.raises(SpecError, match="no state of an optimizer"):
        start_run(tmp_path, imported.id, {"optimizer": True})
    with pytest.raises(SpecError, match="order: continue needs a run that was trained here"):
        start_run(tmp_path, imported.id, {"order": "continue"})
    with pytest.raises(SpecError, match=f"seed is 1, and that of {source.id}"):
        start_run(tmp_path, source.id, {"order": "continue"}, seed=1)


def import_exported(source: RunDir, folder: Path) -> str:
    export_run(source, folder / "exported")
    return import_folder(folder / "exported", "imported", folder / "runs", None).id


def test_another_tokenizer_is_refused(tmp_path):
    source = make_source(tmp_path)
    other_data = tmp_path / "other"
    other_data.mkdir()
    (other_data / "manifest.json").write_text(make_manifest({"web/a": 50}).model_dump_json())
    llama_tokenizer(["quite another text about nothing at all"] * 8, 320).save(str(other_data / "tokenizer.json"))
    with pytest.raises(SpecError, match="has another tokenizer than the data"):
        start_run(tmp_path, source.id, {}, data={"sources": {"web": {"path": "raw"}}, "prepared": str(other_data)})


def test_a_tokenizer_may_be_in_an_object_store(tmp_path, monkeypatch):
    source = make_source(tmp_path)
    start_model = find_start_model(str(source.path), tmp_path)
    tokenizer_file = ObjectPath("s3://bucket/run/tokenizer.json")
    remote_model = start_model._replace(tokenizer_file=tokenizer_file)
    monkeypatch.setattr("mhmoe_ray.checkpoint.start.resolve.find_start_model", lambda *_: remote_model)
    monkeypatch.setattr(ObjectPath, "read_bytes", lambda _: start_model.tokenizer_file.read_bytes())
    monkeypatch.setattr(ObjectPath, "is_file", lambda _: True)
    data = {"sources": {"web": {"path": "raw"}}, "prepared": "new"}
    train = tiny_spec(train=TRAIN).train.model_dump()
    tree = {"name": "branch", "start": {"from": source.id}, "data": data, "train": train}
    assert build_spec(tree, "spec").data.tokenizer == tokenizer_file


def test_a_spec_with_a_start_survives_a_dump(tmp_path):
    source = make_source(tmp_path)
    run = start_run(tmp_path, f"{source.id}@4", {"optimizer": True})
    spec = run.spec()
    assert spec.start.sources == [str(first_checkpoint(source))]
    assert find_start_model(spec.start.sources[0], tmp_path).ancestor.name == source.id
    assert "from: " in dump_spec(spec)
