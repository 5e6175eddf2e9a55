from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import to_model_samples
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir, create_run
from mhmoe_ray.spec import load_resolved_spec
from mhmoe_ray.storage import copy_file
from mhmoe_ray.train.objectives.next_token import micro_batch, sample_digest
from mhmoe_ray.train.step import Trainer
from mhmoe_ray.train.worker import combine_digests
from tests.cli.run import mhmoe
from tests.data.texts import make_documents, write_documents
from tests.faults import harness
from tests.support.events import LINE
from tests.support.ranks import run_ranks


@pytest.fixture(scope="session")
def project(tmp_path_factory, local_cluster) -> Path:
    """Return a project folder with raw text; the first run in it prepares the data for all others."""
    folder = tmp_path_factory.mktemp("faults")
    # There are few files, because preparation starts a process for each.
    for name, count in (("a", 60), ("b", 40)):
        write_documents(folder / "raw" / name / "one.jsonl", make_documents(name, count))
    return folder


@pytest.fixture(scope="session")
def reference(project) -> RunDir:
    return undisturbed_run(project)


def undisturbed_run(project: Path, **cluster: int) -> RunDir:
    """Train a run of 120 steps without Ray and without faults; return it with its metrics and its last checkpoint."""
    harness.write_random_spec(project, train={"steps": 120}, cluster=cluster)
    spec = load_resolved_spec(project / "spec.yaml")
    if not spec.data.prepared.exists():
        assert mhmoe(project, "data", "prepare", "spec.yaml").code == 0
    run = create_run(spec.model_copy(update={"storage": project / "undisturbed"}))
    copy_file(spec.data.prepared / "tokenizer.json", run.tokenizer_file)
    samples = TrainingSamples(spec)
    steps, m, b = spec.train.steps, spec.train.micro_batches, spec.train.micro_batch_size
    stored = samples.read(np.arange(steps * m * b)).reshape(steps, m, b, -1)
    run_ranks(spec.cluster.workers.max, train, run, stored, samples.token_bytes)
    return run


def train(run: RunDir, stored: np.ndarray, token_bytes: int) -> None:
    """Train a run to its last step as one rank of a process group, and save a checkpoint at the end.

    Rank 0 writes the history, with the metrics that faults must not change.

    Args:
        run: The run directory.
        stored: The samples of all steps, by step and micro-batch.
        token_bytes: The number of bytes that store a token.
    """
    spec, cluster = run.spec(), run.spec().cluster
    torch.set_num_threads(cluster.cpus_per_worker)
    mesh = build_mesh(cluster, ["here"] * cluster.workers.max, "cpu")
    inputs = boundaries(load_tokenizer(run.tokenizer_file, spec.model.vocab_size))
    trainer = Trainer(spec, mesh, torch.device("cpu"), inputs)
    saver = Saver(run, trainer, group=1)
    for step_samples in stored:
        rank_samples = step_samples[mesh.rank :: mesh.world_size]
        sums = trainer.accumulate(
            [micro_batch(to_model_samples(samples, token_bytes), trainer.device) for samples in rank_samples]
        )
        update = trainer.update(sums)
        loss_balance = torch.tensor([sums.loss, sums.balance], dtype=torch.float64)
        dist.all_reduce(loss_balance)
        line = {
            metrics.STEP: trainer.step,
            metrics.LOSS: float(loss_balance[0]) / sums.targets,
            metrics.GRAD_NORM: update.norm,
            metrics.BALANCE: float(loss_balance[1]) / spec.train.micro_batches / spec.model.moe_layers,
            metrics.TOKENS: trainer.tokens,
            metrics.STREAM: combine_digests(map(sample_digest, step_samples)),
            metrics.LR: update.lr,
        }
        if mesh.rank == 0:
            history.append(run, {**LINE, **line})
    saver.save(trainer.zero_counts())
    saver.wait()
