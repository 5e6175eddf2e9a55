"""The objectives of encoders: hidden patches and tokens are predicted, and images are matched with their texts.

Each part of a micro-batch becomes a group of the encoder's batch, with a loss for its patches, its tokens, both, or the
match of its pairs. Pairs are compared within a micro-batch, so their loss does not depend on the number of ranks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mhmoe_ray.data.family import PartSamples
from mhmoe_ray.families.encoder.data.batches import BatchMaker, evaluated_samples
from mhmoe_ray.families.encoder.data.columns import EncoderSamples
from mhmoe_ray.families.encoder.model import EncoderBatch
from mhmoe_ray.families.images.part_objective import PartObjective
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import MicroBatchPart, RunSpec
from mhmoe_ray.train.objectives.base import Environment, array_digest

if TYPE_CHECKING:
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.runs.directory import RunDir


class Masked(PartObjective[EncoderBatch]):
    """Objective of encoders, whose micro-batches have parts with masked, contrastive or captioning losses."""

    def __init__(self, environment: Environment, model: Trunk, inputs: np.ndarray | None = None) -> None:
        super().__init__(environment, model)
        self._batch_maker = BatchMaker(self.spec.model, self.device, inputs)

    @staticmethod
    def load_inputs(run: "RunDir", spec: RunSpec, manifest: "DataManifest") -> np.ndarray | None:
        """Return the codebook of image patches, float32 (entries, values); None without one."""
        from mhmoe_ray.families.encoder.data.rows import read_codebook

        return read_codebook(spec.data.prepared, manifest)

    def receive(self, rows: Mapping[str, np.ndarray]) -> tuple[int, EncoderBatch]:
        # The stream's columns may be in read-only memory, which torch does not support, so they are copied.
        samples = EncoderSamples(*(np.array(rows[name][0]) for name in EncoderSamples._fields))
        return array_digest(samples), self._batch_maker.make(self.spec.parts, samples)

    def target_counts(self, batch: EncoderBatch) -> list[int]:
        return [count for group in batch.groups for count in group.target_counts]

    def evaluated_samples(self, part: MicroBatchPart, samples: PartSamples[EncoderSamples]) -> int:
        return evaluated_samples(part, samples)

    def part_batch(
        self, part: MicroBatchPart, samples: PartSamples[EncoderSamples], start: int, stop: int
    ) -> EncoderBatch:
        return self._batch_maker.make([part._replace(samples=stop - start)], samples.rows(start, stop))
