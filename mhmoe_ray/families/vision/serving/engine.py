"""The engine of vision models: a thread runs the model on up to `max_concurrency` images of a task in one pass."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from mhmoe_ray.families.vision.model import Detection, Vision
from mhmoe_ray.families.vision.serving.request import DetectedObjects, VisionOutput, VisionRequest
from mhmoe_ray.serving.engine.round_engine import RoundEngine
from mhmoe_ray.spec import ServeSpec


class VisionEngine(RoundEngine[VisionRequest, VisionOutput]):
    """Engine of one vision model, for requests to all of its tasks."""

    def __init__(self, model: Vision, spec: ServeSpec) -> None:
        super().__init__(model.spec, next(model.parameters()).device, spec)
        vision = model.spec.vision
        assert vision is not None
        self._model = model
        self.top_k = dict(zip(model.tasks, model.top_k if model.spec.moe else [0] * len(model.tasks), strict=True))
        """Number of experts that each sub-token chooses, by task; 0 for a model without experts."""
        self.patches = {name: vision.patches(task) for name, task in model.tasks.items()}
        """Number of patches of an image, by task."""
        self._thread.start()

    def _round_key(self, value: VisionRequest) -> Hashable:
        return value.task

    def _count_input_tokens(self, value: VisionRequest) -> int:
        return self.patches[value.task]

    def _compute(self, inputs: Sequence[VisionRequest]) -> list[VisionOutput]:
        name = inputs[0].task
        pixels_NYXC = torch.from_numpy(np.stack([value.image for value in inputs])).to(self._device)
        features = self._model.encode([pixels_NYXC if task == name else self._no_images(task) for task in self.patches])
        patch_NPM = features.patches[list(self.patches).index(name)]
        count_LE = [routing.count_E.tolist() for routing in features.routing]
        self._record_pass(count_LE, patch_NPM.shape[:2].numel())
        if self._model.tasks[name].detector is None:
            outputs = [VisionOutput(logits_C.numpy()) for logits_C in self._model.class_logits(name, patch_NPM).cpu()]
        else:
            outputs = [VisionOutput(None, _on_host(detection)) for detection in self._model.detect(name, patch_NPM)]
        if features.routing and any(value.has_routes for value in inputs):
            heads = self._model.spec.moe.heads if self._model.spec.moe else 1
            # The router chooses as many experts as the task with the largest `top_k` needs. A task with a smaller
            # `top_k` uses only the first choices.
            choices = [
                routing.expert_NK[:, : self.top_k[name]].view(*patch_NPM.shape[:2], heads, -1).cpu().numpy()
                for routing in features.routing
            ]
            expert_NLPHK = np.stack(choices, 1)[:, :, -self.patches[name] :]  # without the class token
            outputs = [
                output._replace(expert_LPHK=expert_LPHK) if value.has_routes else output
                for value, output, expert_LPHK in zip(inputs, outputs, expert_NLPHK, strict=True)
            ]
        return outputs

    def _no_images(self, task: str) -> Tensor:
        size = self._model.tasks[task].image_size
        return torch.empty((0, size, size, 3), dtype=torch.uint8, device=self._device)


def _on_host(detection: Detection) -> DetectedObjects:
    return DetectedObjects(*(tensor.cpu().numpy() for tensor in detection))
