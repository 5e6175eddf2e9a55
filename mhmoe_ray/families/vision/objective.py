"""The objective of vision models: images are classified, and objects are found in them, as each task of the spec says.

Every loss of a task is a mean over images, so an image with many objects counts as much as one with few.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mhmoe_ray.data.family import PartSamples
from mhmoe_ray.families.images.part_objective import PartObjective
from mhmoe_ray.families.vision.adaptive import AdaptiveTopK, TopKChange
from mhmoe_ray.families.vision.data.batches import task_batch
from mhmoe_ray.families.vision.data.columns import TaskSamples, VisionSamples, samples_in_row
from mhmoe_ray.families.vision.model import Vision, VisionBatch
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.runs import metrics
from mhmoe_ray.spec import MicroBatchPart
from mhmoe_ray.train.objectives.base import Environment, array_digest


class Tasks(PartObjective[VisionBatch]):
    """Objective of vision models, whose micro-batches have samples of several tasks."""

    def __init__(self, environment: Environment, model: Trunk, inputs: None = None) -> None:
        super().__init__(environment, model)
        assert isinstance(model, Vision)
        assert self.spec.model.vision is not None
        self._vision, self._model = self.spec.model.vision, model
        self._parts = {part.name: part for part in self.spec.parts}
        moe, adaptive = self.spec.model.moe, self._vision.adaptive
        self.adaptive: AdaptiveTopK | None = None
        if moe is not None and adaptive is not None:
            self.adaptive = AdaptiveTopK(adaptive, list(self._vision.tasks), moe.top_k)

    def receive(self, rows: Mapping[str, np.ndarray]) -> tuple[int, VisionBatch]:
        samples = samples_in_row(rows, self.spec.parts)
        digest = array_digest(array for task_samples in samples.values() for array in task_samples.arrays())
        return digest, self._batch(samples)

    def _batch(self, samples: VisionSamples) -> VisionBatch:
        """Return samples as a micro-batch of all tasks; a task without samples gets zero images."""
        return tuple(
            task_batch(samples.get(name) or self._no_samples(name), self.device) for name in self._vision.tasks
        )

    def _no_samples(self, name: str) -> TaskSamples:
        task = self._vision.tasks[name]
        images = np.empty((0, task.image_size, task.image_size, 3), np.uint8)
        return TaskSamples(images, np.empty(0, np.int64) if task.detector is None else None)

    def target_counts(self, batch: VisionBatch) -> list[int]:
        return [len(task.image_NYXC) for part, task in zip(self.spec.parts, batch, strict=True) for _ in part.losses]

    def evaluated_samples(self, part: MicroBatchPart, samples: PartSamples[TaskSamples]) -> int:
        return samples.sample_count

    def part_batch(self, part: MicroBatchPart, samples: PartSamples[TaskSamples], start: int, stop: int) -> VisionBatch:
        return self._batch({part.name: samples.rows(start, stop)})

    def losses_of(self, part: MicroBatchPart) -> slice:
        names = self.spec.loss_names
        start = names.index(part.losses[0])
        return slice(start, start + len(part.losses))

    def adapt(self, samples: Mapping[str, PartSamples[TaskSamples]], step: int) -> Sequence[TopKChange]:
        """Validate the tasks, adapt how many experts each of them chooses, and return the changes, equal on all ranks.

        This is a collective operation. Nothing happens unless the spec makes these numbers adaptive and `step` is a
        multiple of the rule's interval.
        """
        rule = self.adaptive
        if rule is None or step == 0 or step % rule.spec.interval:
            return []
        with torch.no_grad():
            losses = {
                name: float((sums[:, 0] / sums[:, 1].clamp(min=1)).sum()) * rule.spec.batches
                for name in self._vision.tasks
                if name in samples
                for sums in [self.part_sums(self._parts[name], samples[name], rule.spec.batches)]
            }
        changes = rule.update(step, losses)
        self._model.set_top_k([rule.top_k[name] for name in self._vision.tasks])
        return changes

    @property
    def metrics(self) -> dict[str, Any]:
        return {} if self.adaptive is None else {metrics.TASK_TOP_K: self.adaptive.top_k}

    @property
    def state(self) -> dict[str, Any] | None:
        return None if self.adaptive is None else self.adaptive.state.model_dump()

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        if self.adaptive is not None and state is not None:
            self.adaptive.load(state)
            self._model.set_top_k([self.adaptive.top_k[name] for name in self._vision.tasks])
