"""The trunk of a vision model, and the losses of its tasks (AdaMV-MoE, ICCV 2023).

All tasks of a micro-batch pass through every block together. They share norms, projections and experts. A patch attends
to the patches of its own image only. The rows of all tasks lie one after another:

    patches of task 1 (n1 x P1, M) |  norm, projections  | attention of | norm, feed-forward layer or experts,
    patches of task 2 (n2 x P2, M) |  of all rows        | each image   | with a router for each task
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.families.images.part_losses import LossPart, PartLosses
from mhmoe_ray.families.vision.model.detector import Detection, Detector, Objects
from mhmoe_ray.families.vision.model.stem import TaskInput
from mhmoe_ray.families.vision.router import TaskRouter
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.branch import Branch
from mhmoe_ray.model.moe import MoELayer, MultiHeadMoE
from mhmoe_ray.model.noise import EMBEDDING, HEADS, Noise, default_generator_from, dropout, seeded_generator
from mhmoe_ray.model.recompute import recompute_in_backward
from mhmoe_ray.model.router import Routing
from mhmoe_ray.model.trunk import Trunk, TrunkBlock, add_residual
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.vision import module_key


class TaskBatch(NamedTuple):
    """Images of one task in a micro-batch, with their targets."""

    image_NYXC: Tensor
    """Images, uint8, (images, image_size, image_size, 3)."""
    class_N: Tensor | None = None
    """Class of each image, int64; None for detection."""
    objects: Sequence[Objects] = ()
    """Objects of each image; empty for classification."""


VisionBatch = tuple[TaskBatch, ...]
"""Micro-batch of a vision model: the images of each task, in the order of the spec's tasks. A task may have none."""


class GroupShape(NamedTuple):
    """Number of images of a task in a micro-batch, and number of patches of each image, with its class token."""

    images: int
    patches: int

    @property
    def rows(self) -> int:
        return self.images * self.patches


class VisionBlock(TrunkBlock):
    """Block of a vision transformer: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int, expert_ids: range | None) -> None:
        super().__init__()
        self.dropout, self.attention_dropout = spec.dropout, spec.attention_dropout
        self.branch = Branch(spec, layer)
        self.moe: MoELayer | None = MultiHeadMoE(spec, expert_ids) if spec.is_moe_layer(layer) else None

    def forward(
        self,
        x_1RM: Tensor,
        shapes: Sequence[GroupShape],
        create_generator: Callable[[], torch.Generator | None],
        recompute: bool,
    ) -> tuple[Tensor, Routing | None]:
        """Return the block's output, and its routing if it has experts.

        `create_generator` returns a new generator in the same state at each call, or None in evaluation. With
        `recompute`, the backward recomputes the attention part.
        """

        def run_attention(x_1RM: Tensor) -> tuple[Tensor, torch.Generator | None]:
            # The backward may run this again and must then draw the same numbers, so each run creates a new generator.
            generator = create_generator()
            y_1RM = self._attend(x_1RM, shapes, generator)
            return add_residual(x_1RM, dropout(y_1RM, self.dropout, generator)), generator

        x_1RM, generator = recompute_in_backward(run_attention, x_1RM) if recompute else run_attention(x_1RM)
        normed = self.branch.ffn_norm(widen(x_1RM))
        if isinstance(self.moe, MultiHeadMoE):
            # The layer itself applies dropout, on each expert's output.
            y_1RM, routing = self.moe(normed, generator, group_tokens=[shape.rows for shape in shapes])
            return add_residual(x_1RM, y_1RM), routing
        assert self.branch.ffn is not None
        return add_residual(x_1RM, dropout(self.branch.ffn(normed), self.dropout, generator)), None

    def _attend(self, x_1RM: Tensor, shapes: Sequence[GroupShape], generator: torch.Generator | None) -> Tensor:
        attention = self.branch.attention
        rows = [shape.rows for shape in shapes]
        heads = [torch.split(t[0], rows) for t in attention.project(self.branch.attention_norm(widen(x_1RM)))]
        dropout_rate = self.attention_dropout if generator is not None else 0.0
        outputs = []
        for shape, *task_heads in zip(shapes, *heads, strict=True):
            q, k, v = (t.view(shape.images, shape.patches, *t.shape[1:]).transpose(1, 2) for t in task_heads)
            if not shape.images:
                outputs.append(task_heads[0])
                continue
            with default_generator_from(generator if dropout_rate else None):
                y_NHPC = F.scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout_rate, enable_gqa=q.shape[1] != k.shape[1]
                )
            outputs.append(y_NHPC.transpose(1, 2).flatten(0, 1))
        return attention.merge(torch.cat(outputs)[None])


class Features(NamedTuple):
    """Outputs of the last norm for the images of a micro-batch."""

    patches: list[Tensor]
    """Outputs for the patches of each task's images, (images, patches, M); that for the class token comes first."""
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, from the first to the last."""


class Vision(Trunk):
    """Vision transformer with tasks.

    Its weights are uninitialized: call `model.init.init_weights` or load a checkpoint next. `expert_ids` are the
    experts that this process holds in every layer, by default all.
    """

    def __init__(self, spec: ModelSpec, expert_ids: range | None = None) -> None:
        super().__init__(spec)
        vision, d = spec.vision, spec.d_model
        assert vision is not None
        self.tasks = vision.tasks
        self.inputs = nn.ModuleDict({module_key(name): TaskInput(spec, task) for name, task in self.tasks.items()})
        self.blocks = nn.ModuleList(VisionBlock(spec, i, expert_ids) for i in range(spec.layers))
        self.norm = modules_of(spec).norm(spec)
        self.outputs = nn.ModuleDict(
            {
                module_key(name): nn.Linear(d, task.classes) if task.detector is None else Detector(d, task)
                for name, task in self.tasks.items()
            }
        )

    def final_norms(self) -> list[nn.Module]:
        return [self.norm]

    @property
    def top_k(self) -> list[int]:
        """The number of experts that a row of each task chooses, in the spec's order; the model must have experts."""
        router = self.moe_layers()[0].router
        assert isinstance(router, TaskRouter)
        return router.top_k

    def set_top_k(self, top_k: Sequence[int]) -> None:
        """Set the number of experts that a row of each task chooses, in the order of the spec's tasks."""
        for layer in self.moe_layers():
            assert isinstance(layer.router, TaskRouter)
            layer.router.top_k = list(top_k)

    def forward(self, batch: VisionBatch, noise: Noise | None = None) -> PartLosses:
        """Return the losses and the routing of a micro-batch.

        `noise` is the source of randomness, None in evaluation, where a detector draws the same random samples at every
        call.
        """
        features = self.encode([task.image_NYXC for task in batch], noise)
        return PartLosses(self.losses(batch, features, noise), features.routing)

    def losses(self, batch: VisionBatch, features: Features, noise: Noise | None = None) -> list[LossPart]:
        """Return the losses of each task of a micro-batch from its features."""
        # All detectors draw from one generator, one after another, and the blocks have generators of their own.
        device = features.patches[0].device
        generator = seeded_generator("evaluation", device) if noise is None else noise.generator(HEADS, device)
        losses = list[LossPart]()
        for name, task_batch, patch_NPM in zip(self.tasks, batch, features.patches, strict=True):
            values = self._values_of(name, task_batch, patch_NPM, generator)
            losses += [LossPart(value_N.sum(), value_N.detach()) for value_N in values]
        return losses

    def _values_of(self, name: str, batch: TaskBatch, patch_NPM: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Return the losses of one task, each with a value per image."""
        if self.tasks[name].detector is not None:
            with torch.autocast(patch_NPM.device.type, enabled=False):
                detector = cast("Detector", self.outputs[module_key(name)])
                return detector.losses(self._maps(patch_NPM), batch.objects, generator)
        assert batch.class_N is not None
        logits_NC = self.class_logits(name, patch_NPM)
        return [F.cross_entropy(logits_NC, batch.class_N, reduction="none")]

    def class_logits(self, name: str, patch_NPM: Tensor) -> Tensor:
        """Return the class logits of a task's images, (N, classes) float32, from the outputs for their patches."""
        # In bfloat16, the logits of several classes would often be equal.
        with torch.autocast(patch_NPM.device.type, enabled=False):
            pooled_NM = widen(patch_NPM)[:, 0] if self.tasks[name].has_class_token else widen(patch_NPM).mean(1)
            logits_NC: Tensor = self.outputs[module_key(name)](pooled_NM)
        return logits_NC

    def detect(self, name: str, patch_NPM: Tensor) -> list[Detection]:
        """Return the objects that a detection task finds in its images, from the outputs for their patches."""
        with torch.autocast(patch_NPM.device.type, enabled=False):
            return cast("Detector", self.outputs[module_key(name)]).detect(self._maps(patch_NPM))

    @staticmethod
    def _maps(patch_NPM: Tensor) -> Tensor:
        """Return the outputs for patches as feature maps of square images, (N, M, height, width), in float32."""
        images, patches, width = patch_NPM.shape
        side = math.isqrt(patches)
        return widen(patch_NPM).transpose(1, 2).reshape(images, width, side, side)

    def encode(self, images: Sequence[Tensor], noise: Noise | None = None) -> Features:
        """Return the outputs of the last norm for the images of each task."""
        active_noise = noise if self.is_random else None
        inputs = [task_input(image) for task_input, image in zip(self.inputs.values(), images, strict=True)]
        shapes = [GroupShape(*x.shape[:2]) for x in inputs]
        x_1RM = torch.cat([x.flatten(0, 1) for x in inputs])[None]
        generator = None if active_noise is None else active_noise.generator(EMBEDDING, x_1RM.device)
        x_1RM = dropout(x_1RM, self.spec.dropout, generator)
        [x_1RM], routings = self.run_blocks(x_1RM, noise=active_noise, shapes=shapes)
        rows = torch.split(self.norm(widen(x_1RM))[0], [shape.rows for shape in shapes])
        return Features(
            [x_RM.view(*shape, self.spec.d_model) for x_RM, shape in zip(rows, shapes, strict=True)], routings
        )
