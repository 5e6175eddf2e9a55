"""Check of the samples that a run has read: they are computed again from the prepared shards and the sample order."""

import numpy as np

from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.train.objectives.next_token import sample_digest
from mhmoe_ray.train.worker import combine_digests


def expected_streams(run: RunDir) -> list[str]:
    """Return the digest of the samples that each step should have read, from step 1 to the last step of the spec."""
    spec = run.spec()
    record = read_start(run)
    samples = TrainingSamples(spec, record.samples_before if record else None)
    m, b = spec.train.micro_batches, spec.train.micro_batch_size
    batches = samples.read(np.arange(spec.train.steps * m * b)).reshape(spec.train.steps, m, b, -1)
    return [combine_digests(sample_digest(micro_batch) for micro_batch in step) for step in batches]


def assert_samples_in_order(run: RunDir) -> None:
    """Assert that the history of a finished run has each step once and in order, with the samples of that step."""
    lines = history.read(run)
    assert [line[metrics.STEP] for line in lines] == list(range(1, run.spec().train.steps + 1))
    assert [line[metrics.STREAM] for line in lines] == expected_streams(run)
