"""Runs without Ray that start from the weights of another run."""

import json
from pathlib import Path

from mhmoe_ray.checkpoint.start.write import write_start_checkpoint
from mhmoe_ray.runs.directory import RunDir, create_run
from mhmoe_ray.storage import copy_file
from tests.checkpoint.huggingface.conftest import TEXT
from tests.data.shards.manifests import make_manifest
from tests.support.llama_tokenizer import llama_tokenizer
from tests.support.ranks import run_ranks
from tests.support.runs import mark_submitted
from tests.support.specs import load_relative_spec, tiny_spec
from tests.train import jobs

DENSE = {**tiny_spec().model.model_dump(), "moe": None, "vocab_size": 320}
TRAIN = {"steps": 8, "schedule": "constant", "warmup_steps": 0}


def make_source(folder: Path, **sections) -> RunDir:
    """Return a run that was trained 4 steps without Ray, with a checkpoint and a prepared folder without shards."""
    sections = {"model": DENSE, "train": TRAIN} | sections
    spec = tiny_spec(folder, **sections)
    spec.data.prepared.mkdir(exist_ok=True)
    (spec.data.prepared / "manifest.json").write_text(make_manifest({"web/a": 50}).model_dump_json())
    llama_tokenizer(TEXT, 320).save(str(spec.data.prepared / "tokenizer.json"))
    run = create_run(spec)
    mark_submitted(run)
    copy_file(spec.data.prepared / "tokenizer.json", run.tokenizer_file)
    run_ranks(1, jobs.train_and_save, spec, run.path, 4)
    return run


def start_run(folder: Path, source: str, start: dict, **sections) -> RunDir:
    """Return a new run whose checkpoint of step 0 is made from the run, checkpoint or folder `source`."""
    tree = {
        "name": "branch",
        "storage": str(folder / "runs"),
        "start": {"from": source, **start},
        "data": {"sources": {"web": {"path": "raw"}}, "prepared": str(folder / "prepared")},
        "train": tiny_spec(train=TRAIN).train.model_dump(),
        **sections,
    }
    path = folder / "branch.yaml"
    path.write_text(json.dumps(tree))
    spec = load_relative_spec(path).with_absolute_paths(folder)
    run = create_run(spec)
    mark_submitted(run)
    copy_file(spec.data.prepared / "tokenizer.json", run.tokenizer_file)
    write_start_checkpoint(run, spec)
    return run
