"""Training on one process without Ray; runs on several workers are compared with its losses and weights."""

from typing import NamedTuple

import numpy as np
import torch

from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import to_model_samples
from mhmoe_ray.data.shards.manifest import require_data_manifest
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.objectives.next_token import micro_batch
from mhmoe_ray.train.step import Trainer


class SingleProcessResult(NamedTuple):
    """The losses of a training by step, and the weights at its end by name."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


def train_on_one_process(spec: RunSpec, steps: int) -> SingleProcessResult:
    """Train the first `steps` steps of a spec in this process instead of on workers, and return the result."""
    cluster = spec.cluster.model_validate({"workers": 1, "ep": 1})
    spec = spec.model_copy(update={"cluster": cluster})
    trainer = Trainer(spec, build_mesh(cluster, ["here"], "cpu"), torch.device("cpu"))
    samples, token_bytes = TrainingSamples(spec), require_data_manifest(spec.data.prepared).token_bytes
    m, b = spec.train.micro_batches, spec.train.micro_batch_size
    losses = []
    for step in range(steps):
        stored = samples.read(step * m * b + np.arange(m * b)).reshape(m, b, -1)
        sums = trainer.accumulate([micro_batch(to_model_samples(rows, token_bytes), trainer.device) for rows in stored])
        trainer.update(sums)
        losses.append(sums.loss / sums.targets)
    return SingleProcessResult(losses, {name: t.detach() for name, t in trainer.strategy.checkpoint_weights().items()})
