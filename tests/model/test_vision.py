"""Tests of the vision model: its tasks, its detector's losses against torchvision's, and learning."""

import numpy as np
import pytest
import torch
import torchvision.models.detection.roi_heads as roi_heads
from torch import nn

from mhmoe_ray.families.vision.data.batches import task_batch
from mhmoe_ray.families.vision.data.columns import TaskSamples
from mhmoe_ray.families.vision.model import Vision, paste_mask
from mhmoe_ray.families.vision.model.detector import Detector
from mhmoe_ray.families.vision.model.pyramid import Pyramid
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise, default_generator_from, seeded_generator
from tests.support.visions import VISION, VIT, image_objects, task_samples, vision_batch, vision_spec


def built_model(spec) -> Vision:
    with torch.device("meta"):
        model = build_model(spec.model)
    assert isinstance(model, Vision)
    model.to_empty(device="cpu")
    init_weights(model, spec.seed)
    return model


def test_images_of_one_task_do_not_influence_those_of_another():
    spec = vision_spec()
    model = built_model(spec)
    batch, other_batch = vision_batch(spec, 0), vision_batch(spec, 1)
    losses = model(batch).losses
    mixed_losses = model((batch[0], other_batch[1])).losses
    torch.testing.assert_close(losses[0].value_I, mixed_losses[0].value_I)
    assert not torch.allclose(losses[1].value_I, mixed_losses[1].value_I)
    # An image is not influenced by other images of the same task either.
    alone_patches = model.encode([batch[0].image_NYXC[:1], batch[1].image_NYXC[:0]]).patches[0]
    torch.testing.assert_close(alone_patches, model.encode([task.image_NYXC for task in batch]).patches[0][:1])


def test_the_trunk_of_adamv_is_the_formula_of_vit():
    """A dense block is x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x)))), with the class token in row 0."""
    spec = vision_spec(**VIT, model__moe=None, model__layers=1)
    model, image_NYXC = built_model(spec), vision_batch(spec)[0].image_NYXC
    stem, [block] = model.inputs["task_classify"], model.blocks
    branch, ffn = block.branch, block.branch.ffn
    pixels = (image_NYXC / 127.5 - 1).unflatten(1, (4, 4)).unflatten(3, (4, 4)).transpose(2, 3).flatten(1, 2)
    patches = stem.patch_projection(pixels.flatten(2))
    x = torch.cat([stem.class_token.weight.expand(3, 1, -1), patches], 1) + stem.position_embedding.weight
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": branch.attention.qkv.weight,
            "in_proj_bias": branch.attention.qkv.bias,
            "out_proj.weight": branch.attention.out.weight,
            "out_proj.bias": branch.attention.out.bias,
        }
    )
    normed = branch.attention_norm(x)
    x = x + attention(normed, normed, normed)[0]
    hidden = nn.functional.gelu(branch.ffn_norm(x) @ ffn.fc1_FD.T + ffn.fc1_bias_F)
    expected = model.norm(x + hidden @ ffn.fc2_DF.T + ffn.fc2_bias_D)
    no_images = torch.empty(0, 32, 32, 3, dtype=torch.uint8)
    encoded = model.encode([image_NYXC, no_images]).patches[0]
    torch.testing.assert_close(encoded, expected)
    head = model.outputs["task_classify"]
    torch.testing.assert_close(model.class_logits("classify", encoded), head(expected[:, 0]))


def test_a_task_has_a_router_of_its_own_and_shares_the_experts():
    spec = vision_spec()
    model = built_model(spec)
    names = {name for name, _ in model.named_parameters()}
    assert {f"blocks.1.moe.router.tasks.task_{task}.weight_ED" for task in ("classify", "detect")} <= names
    batch = vision_batch(spec)
    losses = [loss.value_I for loss in model(batch).losses]
    with torch.no_grad():
        model.blocks[1].moe.router.tasks["task_detect"].weight_ED.neg_()
    changed_losses = [loss.value_I for loss in model(batch).losses]
    torch.testing.assert_close(losses[0], changed_losses[0])
    assert not torch.allclose(losses[1], changed_losses[1])
    shared = built_model(vision_spec(model__vision__routers="shared"))
    assert "blocks.1.moe.router.scores.weight_ED" in dict(shared.named_parameters())


def test_every_weight_gets_a_gradient_even_without_objects():
    spec = vision_spec()
    model = built_model(spec)
    batch = vision_batch(spec)
    no_objects = batch[1]._replace(
        objects=[type(o)(o.box_O4[:0], o.class_O[:0], o.mask_OYX[:0]) for o in batch[1].objects]
    )
    losses = model((batch[0], no_objects), Noise(0, 0)).losses
    sum(loss.sum for loss in losses).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert all(loss.value_I.isfinite().all() for loss in losses)


def test_losses_of_an_image_are_those_of_torchvision():
    """torchvision's losses are means over the samples of a batch. Ours are sums over the samples of an image,
    divided by the number of samples that the spec asks for. For one image with that number, both are equal."""
    spec = vision_spec(
        model__vision__tasks__detect__detector__anchor_samples=16,
        model__vision__tasks__detect__detector__box_samples=8,
    )
    model = built_model(spec)
    detector = model.outputs["task_detect"]
    assert isinstance(detector, Detector)
    part = spec.parts[1]._replace(samples=1)
    batch = task_batch(task_samples(spec, part, 3), torch.device("cpu"))
    assert len(batch.objects[0].class_O)
    patches = model.encode([torch.empty(0, 16, 16, 3, dtype=torch.uint8), batch.image_NYXC]).patches[1].detach()
    maps = model._maps(patches)
    losses = detector.losses(maps, batch.objects, seeded_generator("test"))

    objects = batch.objects[0]
    targets = [{"boxes": objects.box_O4, "labels": objects.class_O + 1, "masks": objects.mask_OYX}]
    features = detector._features(maps)
    proposals = detector._propose(features)
    with default_generator_from(seeded_generator("test")):
        labels, matched_boxes = detector.regions.assign_targets_to_anchors(proposals.anchors, targets)
        anchor_edges = detector.regions.box_coder.encode(matched_boxes, proposals.anchors)
        objectness, edge_loss = detector.regions.compute_loss(
            proposals.objectness_NA.flatten(), proposals.edge_NA4.flatten(0, 1), labels, anchor_edges
        )
        boxes, matches, box_labels, box_edges = detector.boxes.select_training_samples(list(proposals.boxes), targets)
    assert len(boxes[0]) == 8
    sizes = [(32, 32)]
    logits, edges = detector.boxes.box_predictor(
        detector.boxes.box_head(detector.boxes.box_roi_pool(features, boxes, sizes))
    )
    class_loss, box_loss = roi_heads.fastrcnn_loss(logits, edges, box_labels, box_edges)
    is_object = torch.where(box_labels[0] > 0)[0]
    mask_boxes = [boxes[0][is_object]]
    mask_logits = detector.boxes.mask_predictor(
        detector.boxes.mask_head(detector.boxes.mask_roi_pool(features, mask_boxes, sizes))
    )
    mask_loss = roi_heads.maskrcnn_loss(
        mask_logits, mask_boxes, [targets[0]["masks"]], [targets[0]["labels"]], [matches[0][is_object]]
    )
    expected = [objectness, edge_loss, class_loss, box_loss, mask_loss]
    torch.testing.assert_close(torch.cat(losses), torch.stack(expected))


def test_the_samples_of_a_detector_follow_the_noise_of_a_micro_batch():
    spec = vision_spec()
    model, batch = built_model(spec), vision_batch(spec)
    state = torch.get_rng_state()
    losses, equal_losses, other_losses = (
        torch.cat([loss.value_I for loss in model(batch, noise).losses])
        for noise in (Noise(0, 1), Noise(0, 1), Noise(0, 2))
    )
    assert torch.equal(losses, equal_losses)
    assert not torch.equal(losses, other_losses)
    # Without noise, as in evaluation, the detector draws the same samples at each call.
    assert torch.equal(*(torch.cat([loss.value_I for loss in model(batch).losses]) for _ in range(2)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("scale", [4, 2, 1, 0.5])
def test_a_level_of_the_pyramid_has_the_scale_it_should(scale):
    level = Pyramid(16, 8, [scale])
    [output] = level(torch.randn(2, 16, 6, 6))
    assert output.shape == (2, 8, int(6 * scale), int(6 * scale))


def test_anchors_are_centred_on_the_cells_of_each_map():
    spec = vision_spec(
        model__vision__tasks__detect__detector__anchor_sizes=[2.0],
        model__vision__tasks__detect__detector__anchor_ratios=[1.0],
    )
    detector = built_model(spec).outputs["task_detect"]
    maps = [torch.zeros(1, 16, 16, 16), torch.zeros(1, 16, 8, 8)]
    [anchors] = detector._anchors_of(maps)
    sides = anchors[:, 2:] - anchors[:, :2]
    assert torch.equal(sides, torch.tensor([[4.0, 4.0]] * 256 + [[8.0, 8.0]] * 64))
    assert torch.equal(anchors[:2], torch.tensor([[-2.0, -2, 2, 2], [0, -2, 4, 2]]))


@pytest.mark.long
def test_a_model_learns_to_find_objects_and_their_masks():
    """The images show coloured ellipses on grey, and the class of an object is its colour."""
    spec = vision_spec(
        model__vision__tasks={"detect": VISION["model"]["vision"]["tasks"]["detect"]},
        data__sources={"scenes": VISION["data"]["sources"]["scenes"]},
        data__parts={"detect": {"sources": ["scenes"], "micro_batch_size": 8}},
        train__micro_batch_size=8,
    )
    model = built_model(spec)
    draws = np.random.default_rng(0)

    def batch(count):
        objects = [image_objects(draws, 1, 32, 3) for _ in range(count)]
        images = np.full((count, 32, 32, 3), 128, np.uint8)
        for image, (_, classes, masks) in zip(images, objects, strict=True):
            for number, mask in zip(classes, masks, strict=True):
                image[mask] = np.eye(3)[number] * 255
        return task_batch(TaskSamples(images, None, objects), torch.device("cpu"))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(160):
        optimizer.zero_grad()
        losses = model((batch(8),), Noise(0, step)).losses
        sum(loss.sum / 8 for loss in losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    held_out = batch(16)
    with torch.no_grad():
        detections = model.detect("detect", model.encode([held_out.image_NYXC]).patches[0])
    hits = mask_overlaps = 0
    for detection, objects in zip(detections, held_out.objects, strict=True):
        if len(detection.class_O) and detection.class_O[0] == objects.class_O[0]:
            hits += 1
            mask = paste_mask(detection.box_mask_OYX[0], detection.box_O4[0], 32) > 0.5
            truth = objects.mask_OYX[0].bool()
            mask_overlaps += float((mask & truth).sum() / (mask | truth).sum())
    assert hits >= 12
    assert mask_overlaps / hits > 0.6
