"""Run directories that have not been trained, and the first checkpoint of a run."""

from pathlib import Path

from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run
from tests.support.specs import tiny_spec


def new_run(folder, cluster, **sections):
    """Create a run with placeholder files for a tokenizer and prepared data, and return its spec and the run.

    `cluster` and `sections` replace keys of the tiny spec.
    """
    spec = tiny_spec(folder, cluster=cluster, **sections)
    run = create_run(spec)
    run.tokenizer_file.write_text("{}")
    spec.data.prepared.mkdir()
    (spec.data.prepared / "manifest.json").write_text("{}")
    return spec, run


def mark_submitted(run: RunDir) -> None:
    """Write the file without which a directory does not count as a run."""
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:9", local=True))


def first_checkpoint(run: RunDir) -> Path:
    [checkpoint] = committed_checkpoints(run)
    return checkpoint
