"""The input layer of a vision transformer: patches of images, by a projection or by convolutions, with positions."""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.families.images.patches import image_patches
from mhmoe_ray.families.vision.model.pyramid import MapNorm
from mhmoe_ray.spec import ModelSpec, TaskSpec


class TaskInput(nn.Module):
    """Input layer of one task: it turns images into patch embeddings of width d, and adds learned positions."""

    def __init__(self, spec: ModelSpec, task: TaskSpec) -> None:
        super().__init__()
        assert spec.vision is not None
        self.patch_size = spec.vision.patch_size
        self.patch_projection: nn.Linear | None = None
        if spec.vision.stem == "linear":
            self.patch_projection = nn.Linear(spec.vision.patch_values, spec.d_model)
        else:
            self.stem = _build_stem(spec.vision.stem_widths(spec.d_model))
        self.class_token = nn.Embedding(1, spec.d_model) if task.has_class_token else None
        self.position_embedding = nn.Embedding(spec.vision.positions(task), spec.d_model)

    def forward(self, image_NYXC: Tensor) -> Tensor:
        """Return the input of the first block for images, (N, P, M), with the class token first if there is one."""
        # Pixels are scaled to the range from -1 to 1.
        if self.patch_projection is not None:
            patch_NPM = widen(self.patch_projection(2 * image_patches(image_NYXC, self.patch_size) - 1))
        else:
            map_NMYX = self.stem(image_NYXC.movedim(-1, 1).float() / 127.5 - 1)
            patch_NPM = widen(map_NMYX).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            patch_NPM = torch.cat([self.class_token.weight.expand(len(patch_NPM), 1, -1), patch_NPM], 1)
        return patch_NPM + self.position_embedding.weight


def _build_stem(widths: list[int]) -> nn.Sequential:
    modules = OrderedDict[str, nn.Module]()
    for number, (channels, width) in enumerate(pairwise(widths)):
        modules[f"convolution{number}"] = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        modules[f"norm{number}"] = MapNorm(width)
        modules[f"function{number}"] = nn.GELU()
    modules["output"] = nn.Conv2d(widths[-1], widths[-1], 1)
    return nn.Sequential(modules)
