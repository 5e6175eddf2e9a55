"""The heads of a detector: region proposals, boxes with classes, and masks (Mask R-CNN, arXiv 1703.06870).

torchvision provides the parts: matching, sampling, pooling of regions, the heads, and the removal of overlaps. Its
losses are means over the samples of a batch, which would give an object more weight in a micro-batch with fewer
objects. Here each image has its own losses: the sum over its samples, divided by the number of samples that an image
should have. Only the loss of masks is the mean over the sampled objects of an image.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_ray.families.vision.model.pyramid import MapNorm, Pyramid
from mhmoe_ray.model.noise import default_generator_from
from mhmoe_ray.spec import TaskSpec

BOX_BETA = 1 / 9
"""Error of a box's edge at which the smooth L1 loss changes from quadratic to linear, as in torchvision."""
POOLED_SIZE = 7
"""Height and width of the pooled feature map from which the class and the edges of a region are computed."""
MASK_SIZE = 14
"""Height and width of the pooled feature map from which a region's mask, twice as high and wide, is computed."""


class Objects(NamedTuple):
    """Labelled objects of one image, in pixels of the image that the model reads."""

    box_O4: Tensor
    """Left, top, right and bottom edges of each object's box, float32."""
    class_O: Tensor
    """Class of each object, int64, from 0."""
    mask_OYX: Tensor
    """Mask of each object, uint8 of 0 and 1; the tensor is empty if the detector has no masks."""


class Detection(NamedTuple):
    """Objects that a detector finds in one image, the most certain ones first."""

    box_O4: Tensor
    """Left, top, right and bottom edges of each box, in pixels of the image that the model reads."""
    class_O: Tensor
    """Class of each object, int64, from 0."""
    score_O: Tensor
    box_mask_OYX: Tensor
    """Mask of each object: probabilities on a grid of cells in its box; empty without masks. See `paste_mask`."""


class Proposals(NamedTuple):
    """Region proposals for images, and the tensors from which the losses of proposals are computed."""

    boxes: list[Tensor]
    """Edges of the proposed boxes of each image, (proposals, 4), without gradients."""
    objectness_NA: Tensor
    """Logit for each anchor that it contains an object."""
    edge_NA4: Tensor
    """Predicted edges of the object of each anchor, relative to the anchor."""
    anchors: list[Tensor]
    """Edges of the anchors (reference boxes) of each image, (A, 4)."""


class Regions(NamedTuple):
    """Regions that are sampled for the losses, in the order of torchvision's `select_training_samples`."""

    boxes: list[Tensor]
    """Edges of each image's regions."""
    matches: list[Tensor]
    """Index of each region's object."""
    labels: list[Tensor]
    """Class of each region, from 1; 0 is the background."""
    edges: list[Tensor]
    """Edges of each region's object, relative to the region."""


class BoxHead(nn.Sequential):
    """Layers that turn the pooled features of a region into features for its class and its edges.

    With norms, a detector without pretrained weights learns faster (arXiv 1811.08883).
    """

    def __init__(self, pooled_values: int, width: int) -> None:
        super().__init__(
            OrderedDict(
                flatten=nn.Flatten(),
                hidden=nn.Linear(pooled_values, width, bias=False),
                hidden_norm=nn.LayerNorm(width),
                hidden_function=nn.ReLU(),
                output=nn.Linear(width, width, bias=False),
                output_norm=nn.LayerNorm(width),
                output_function=nn.ReLU(),
            )
        )


class Detector(nn.Module):
    """Object detector on the feature map of a vision transformer: boxes with classes, and optionally masks."""

    def __init__(self, d_model: int, task: TaskSpec) -> None:
        # torchvision is imported here, because it is an optional dependency that models without detectors do not need.
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.models.detection.roi_heads import RoIHeads
        from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
        from torchvision.ops import MultiScaleRoIAlign

        super().__init__()
        spec = task.detector
        assert spec is not None
        self.spec, self.image_size = spec, task.image_size
        self.pyramid = Pyramid(d_model, spec.width, spec.scales)
        names = [str(number) for number in range(len(spec.scales))]
        anchors_per_cell = len(spec.anchor_sizes) * len(spec.anchor_ratios)
        # Anchors need real values even if the weights are created on the meta device. The sizes here are placeholders,
        # because the final ones depend on the feature maps; `_anchors_of` sets them.
        with torch.device("cpu"):
            self.anchors = AnchorGenerator([(1.0,)] * len(names), [(1.0,)] * len(names))
        self.regions = RegionProposalNetwork(
            self.anchors,
            RPNHead(spec.width, anchors_per_cell),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=spec.anchor_samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": spec.candidates, "testing": spec.candidates},
            post_nms_top_n={"training": spec.proposals, "testing": spec.proposals},
            nms_thresh=0.7,
        )
        mask_modules: dict[str, nn.Module] = {}
        if spec.masks:
            mask_modules = {
                "mask_roi_pool": MultiScaleRoIAlign(names, MASK_SIZE, spec.pooling_samples),
                "mask_head": MaskRCNNHeads(spec.width, [spec.width] * spec.mask_layers, 1, norm_layer=MapNorm),
                "mask_predictor": MaskRCNNPredictor(spec.width, spec.width, task.classes + 1),
            }
        self.boxes = RoIHeads(
            MultiScaleRoIAlign(names, POOLED_SIZE, spec.pooling_samples),
            BoxHead(spec.width * POOLED_SIZE**2, spec.d_box),
            FastRCNNPredictor(spec.d_box, task.classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=spec.box_samples,
            positive_fraction=0.5,
            bbox_reg_weights=None,
            score_thresh=spec.score_threshold,
            nms_thresh=spec.overlap_threshold,
            detections_per_img=spec.max_objects,
            **mask_modules,
        )

    def losses(self, map_NMYX: Tensor, targets: Sequence[Objects], generator: torch.Generator) -> list[Tensor]:
        """Return the losses of each image, (N,) float32 each, in the order of `spec.parts.DETECTION_LOSSES`."""
        # torchvision numbers classes from 1, and 0 is the background.
        dicts = [{"boxes": t.box_O4, "labels": t.class_O + 1, "masks": t.mask_OYX} for t in targets]
        if not dicts:
            return [map_NMYX.sum((1, 2, 3))] * (5 if self.spec.masks else 4)
        features = self._features(map_NMYX)
        proposals = self._propose(features)
        # torchvision draws from the device's default generator, which meanwhile has the state of our generator.
        with default_generator_from(generator):
            anchor_losses = self._anchor_losses(proposals, dicts)
            regions = Regions(*self.boxes.select_training_samples(list(proposals.boxes), dicts))
        return [*anchor_losses, *self._region_losses(features, regions, dicts)]

    @torch.no_grad()
    def detect(self, map_NMYX: Tensor) -> list[Detection]:
        """Return the objects in each image; the model must be in evaluation mode."""
        if not len(map_NMYX):
            return []
        features = self._features(map_NMYX)
        boxes = self._propose(features).boxes
        results, _ = self.boxes(features, boxes, self._sizes(len(boxes)))
        no_masks = map_NMYX.new_zeros(0, 2 * MASK_SIZE, 2 * MASK_SIZE)
        return [
            Detection(
                result["boxes"],
                result["labels"] - 1,
                result["scores"],
                result["masks"][:, 0] if self.spec.masks else no_masks,
            )
            for result in results
        ]

    def _sizes(self, images: int) -> list[tuple[int, int]]:
        return [(self.image_size, self.image_size)] * images

    def _features(self, map_NMYX: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all scales, by the names that torchvision's pooling expects."""
        return {str(number): level for number, level in enumerate(self.pyramid(map_NMYX))}

    def _propose(self, features: dict[str, Tensor]) -> Proposals:
        from torchvision.models.detection.rpn import concat_box_prediction_layers

        maps = list(features.values())
        objectness, edges = self.regions.head(maps)
        anchors = self._anchors_of(maps)
        counts = [t[0].numel() for t in objectness]
        objectness_R1, edge_R4 = concat_box_prediction_layers(objectness, edges)
        images = len(maps[0])
        box_NA4 = self.regions.box_coder.decode(edge_R4.detach(), anchors).view(images, -1, 4)
        boxes, _ = self.regions.filter_proposals(box_NA4, objectness_R1.detach(), self._sizes(images), counts)
        return Proposals(boxes, objectness_R1.view(images, -1), edge_R4.view(images, -1, 4), anchors)

    def _anchors_of(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return each image's anchors on all maps, in the order of torchvision's `concat_box_prediction_layers`."""
        spec, device = self.spec, maps[0].device
        strides = [self.image_size // level.shape[-1] for level in maps]
        self.anchors.cell_anchors = [
            self.anchors.generate_anchors(
                [size * stride for size in spec.anchor_sizes], spec.anchor_ratios, torch.float32, device
            )
            for stride in strides
        ]
        strides_yx = [[torch.tensor(stride, device=device)] * 2 for stride in strides]
        anchors = self.anchors.grid_anchors([list(level.shape[-2:]) for level in maps], strides_yx)
        return [torch.cat(anchors)] * len(maps[0])

    def _anchor_losses(self, proposals: Proposals, targets: list[dict[str, Tensor]]) -> list[Tensor]:
        """Return two losses of each image, (N,) each: whether anchors contain an object, and the edges of proposals."""
        regions = self.regions
        labels, matched_boxes = regions.assign_targets_to_anchors(proposals.anchors, targets)
        edge_NA4 = torch.stack(regions.box_coder.encode(matched_boxes, proposals.anchors))
        positive, negative = (torch.stack(masks) for masks in regions.fg_bg_sampler(labels))
        is_positive_NA, is_sampled_NA = positive.bool(), (positive + negative).bool()
        label_NA = torch.stack(labels)
        objectness_NA = F.binary_cross_entropy_with_logits(proposals.objectness_NA, label_NA.clamp(0), reduction="none")
        edge_loss_NA = F.smooth_l1_loss(proposals.edge_NA4, edge_NA4, beta=BOX_BETA, reduction="none").sum(-1)
        quota = self.spec.anchor_samples
        return [
            torch.where(mask_NA, loss_NA, 0).sum(1) / quota
            for mask_NA, loss_NA in ((is_sampled_NA, objectness_NA), (is_positive_NA, edge_loss_NA))
        ]

    def _region_losses(
        self, features: dict[str, Tensor], regions: Regions, targets: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        """Return the losses of each image's boxes, (N,) each: of classes, of edges and, if there are any, of masks."""
        boxes = regions.boxes
        sizes = self._sizes(len(boxes))
        pooled = self.boxes.box_head(self.boxes.box_roi_pool(features, boxes, sizes))
        logits_RC, edge_RC4 = self.boxes.box_predictor(pooled)
        counts, quota = [len(b) for b in boxes], self.spec.box_samples
        label_R, edge_R4 = torch.cat(regions.labels), torch.cat(regions.edges)
        class_loss_R = F.cross_entropy(logits_RC, label_R, reduction="none")
        # A region of the background has no edges to learn. Its class 0 selects edges that are then masked.
        own_edge_R4 = edge_RC4.view(len(label_R), -1, 4)[torch.arange(len(label_R), device=label_R.device), label_R]
        edge_loss_R = F.smooth_l1_loss(own_edge_R4, edge_R4, beta=BOX_BETA, reduction="none").sum(-1)
        edge_loss_R = torch.where(label_R > 0, edge_loss_R, 0)
        losses = [_sums_of_images(loss_R, counts) / quota for loss_R in (class_loss_R, edge_loss_R)]
        if self.spec.masks:
            losses.append(self._mask_losses(features, regions, targets))
        return losses

    def _mask_losses(self, features: dict[str, Tensor], regions: Regions, targets: list[dict[str, Tensor]]) -> Tensor:
        """Return the mean mask loss of each image's sampled objects, (N,)."""
        from torchvision.models.detection.roi_heads import project_masks_on_boxes

        heads: Any = self.boxes
        boxes, matches, labels, _ = regions
        object_rows = [torch.where(label_R > 0)[0] for label_R in labels]
        mask_boxes = [box_R4[rows] for box_R4, rows in zip(boxes, object_rows, strict=True)]
        sizes = self._sizes(len(boxes))
        logits_RCYX = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, mask_boxes, sizes)))
        counts = [len(rows) for rows in object_rows]
        label_R = torch.cat([label_R[rows] for label_R, rows in zip(labels, object_rows, strict=True)])
        if not len(label_R):
            # Without regions that show objects, the mask head gets gradients of zeros, because distributed strategies
            # expect a gradient for every weight.
            return torch.stack([logits_RCYX.sum()] * len(boxes))
        target_RYX = torch.cat(
            [
                project_masks_on_boxes(target["masks"], box_R4, match_R[rows], logits_RCYX.shape[-1])
                for target, box_R4, match_R, rows in zip(targets, mask_boxes, matches, object_rows, strict=True)
                if len(rows)
            ]
        )
        own_logits_RYX = logits_RCYX[torch.arange(len(label_R), device=label_R.device), label_R]
        loss_R = F.binary_cross_entropy_with_logits(own_logits_RYX, target_RYX, reduction="none").mean((1, 2))
        return _sums_of_images(loss_R, counts) / torch.tensor(counts, device=loss_R.device).clamp(min=1)


def paste_mask(box_mask_YX: Tensor, box_4: Tensor, image_size: int) -> Tensor:
    """Return the probability that each pixel of the model's square image belongs to an object, from a grid of cells
    inside the object's box, whose edges are in pixels."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    mask_YX: Tensor = paste_masks_in_image(box_mask_YX[None, None], box_4[None], (image_size, image_size))[0, 0]
    return mask_YX


def _sums_of_images(value_R: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the sum of each image's values. Image i has the next `counts[i]` values."""
    return torch.stack([part.sum() for part in torch.split(value_R, list(counts))])
