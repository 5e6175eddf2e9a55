"""Tests of the multiway encoder."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.families.encoder.model.match import MatchHead
from mhmoe_ray.families.images.patches import image_patches
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.planner.resolve import find_preset
from mhmoe_ray.planner.sizes import block_sizes, compute_sizes
from mhmoe_ray.spec import ModelSpec
from tests.support.encoders import CAPTION_DATA, ENCODER, PADDING, SMEAR, encoder_batch, encoder_spec, part_samples

TEXTS = {"captions": {"path": "/nowhere/captions", "format": "text"}}
EXPERTS = {"multi-head": ENCODER["model"]["moe"], "smear": SMEAR}


def build_encoder(spec):
    """Return the encoder of a spec with initial weights, in evaluation mode."""
    model = build_model(spec.model)
    init_weights(model, 0)
    return model.eval()


def losses(model, batch):
    """Return one tensor for each loss of the model, with the loss of each of its targets in the batch."""
    with torch.no_grad():
        return [loss.value_I for loss in model(batch).losses]


def test_beit3_base_has_its_number_of_parameters():
    """276,510,730 is the sum over BEiT-3's published layers, heads and tables of positions."""
    spec = ModelSpec.model_validate(find_preset("p1-multimodal-dense").trunk)
    with torch.device("meta"):
        model = build_model(spec)
    assert sum(p.numel() for p in model.parameters()) == compute_sizes(spec).parameters == 276_510_730


@pytest.mark.parametrize("moe", [None, {"heads": 4, "every": 1, "dense_first": 1}, {"heads": 1, "every": 2}])
@pytest.mark.parametrize("experts", ["beside", "replace"])
@pytest.mark.parametrize("routers", ["shared", "per_modality"])
@pytest.mark.parametrize("targets", ["pixels", "codebook"])
def test_counts_of_parameters_are_those_of_the_model(moe, experts, routers, targets):
    spec = encoder_spec(
        model__layers=4,
        model__moe=moe and {"experts": 4, "d_expert": 24, "router": "xmoe_torchscale", **moe},
        model__encoder__experts=experts,
        model__encoder__routers=routers,
        model__encoder__image_targets=targets,
    ).model
    with torch.device("meta"):
        model = build_model(spec)
    sizes = block_sizes(spec)
    assert sum(p.numel() for p in model.parameters()) == compute_sizes(spec).parameters
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("blocks.")) == sizes.outside
    for block in model.blocks:
        parameters = sum(p.numel() for name, p in block.named_parameters() if ".experts." not in name)
        assert parameters == (sizes.dense if block.moe is None else sizes.mixture)


@pytest.mark.parametrize("routers", ["shared", "per_modality"])
def test_samples_do_not_influence_each_other(routers):
    """Each sample of a part with hidden tokens or patches has the same losses alone as in a whole micro-batch."""
    spec = encoder_spec(model__encoder__routers=routers)
    model, maker = build_encoder(spec), BatchMaker(spec.model, torch.device("cpu"))
    batch_losses = dict(zip(spec.loss_names, losses(model, encoder_batch(spec)), strict=True))
    for number, part in enumerate(spec.parts[:3]):
        samples = part_samples(spec, part, number)
        singles = [
            losses(model, maker.make([part._replace(samples=1)], samples.rows(i, i + 1))) for i in range(part.samples)
        ]
        for name, values in zip(part.losses, zip(*singles, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(values), batch_losses[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", EXPERTS)
def test_padding_has_no_influence(experts):
    spec = encoder_spec(model__moe=EXPERTS[experts])
    model, batch = build_encoder(spec), encoder_batch(spec)
    other_batch = batch._replace(token_NT=torch.where(batch.is_token_NT, batch.token_NT, 17))
    for values, other_values in zip(losses(model, batch), losses(model, other_batch), strict=True):
        torch.testing.assert_close(values, other_values)


def test_halves_of_a_pair_influence_each_other():
    """A pair's text losses depend on its image, and vice versa; texts and images that are no pairs are independent."""
    spec = encoder_spec()
    model, batch = build_encoder(spec), encoder_batch(spec)
    changed_image = batch._replace(image_NYXC=255 - batch.image_NYXC)
    changed_text = batch._replace(token_NT=(batch.token_NT + 1) % 290)
    expected, by_image, by_text = (
        dict(zip(spec.loss_names, losses(model, b), strict=True)) for b in (batch, changed_image, changed_text)
    )
    # The rounding of an expert's product depends on the place of a row, and the other rows have moved.
    torch.testing.assert_close(expected["texts"], by_image["texts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected["images"], by_text["images"], rtol=1e-5, atol=1e-5)
    pairs = [("pairs_text", by_image), ("pairs_image", by_text), ("match", by_image), ("match", by_text)]
    for name, changed_losses in pairs:
        assert not torch.isclose(expected[name], changed_losses[name]).any()


def caption_batch(change_image=False, changed_position=None):
    """Return an encoder and a micro-batch of one image with a caption of five tokens.

    The image is changed if `change_image` is true, and so is the input token at `changed_position`, if that is given.
    """
    spec = encoder_spec(model__encoder__d_match=None, data__parts=CAPTION_DATA["parts"])
    part = spec.parts[-1]._replace(samples=1)
    samples = part_samples(spec, part, 0)
    samples.tokens[0, :6] = samples.inputs[0, :6] = [0, 11, 12, 13, 14, 15]
    samples.tokens[0, 6:] = samples.inputs[0, 6:] = PADDING
    samples.token_predicted[0] = np.arange(spec.data.seq_len) < 6
    if changed_position is not None:
        samples.inputs[0, changed_position] = 200
    if change_image:
        samples.images[0] = 255 - samples.images[0]
    return build_encoder(spec), BatchMaker(spec.model, torch.device("cpu")).make([part], samples)


def test_captions_predict_each_token_and_the_end():
    _, batch = caption_batch()
    assert batch.hidden_token_J.tolist() == [0, 1, 2, 3, 4, 5]
    # The start token marks the end, too.
    assert batch.token_target_J.tolist() == [11, 12, 13, 14, 15, 0]


def test_tokens_of_captions_see_their_image_and_earlier_tokens_alone():
    model, batch = caption_batch()
    [expected] = losses(model, batch)
    [changed] = losses(model, caption_batch(changed_position=3)[1])
    torch.testing.assert_close(changed[:3], expected[:3], rtol=0, atol=1e-6)
    assert (changed[3:] - expected[3:]).abs().min() > 1e-5
    [other_image] = losses(model, caption_batch(change_image=True)[1])
    assert (other_image - expected).abs().min() > 1e-5


def test_images_of_captions_do_not_see_their_text():
    """Otherwise a token could read later tokens by way of the image in two blocks: token to image, image to token."""
    model, batch = caption_batch()
    output = {}
    model.image_norm.register_forward_hook(lambda module, inputs, result: output.update(image=result))
    losses(model, batch)
    expected = output["image"]
    losses(model, caption_batch(changed_position=1)[1])
    torch.testing.assert_close(output["image"], expected, rtol=0, atol=1e-6)


def test_hidden_patches_are_not_read():
    spec = encoder_spec()
    model, batch = build_encoder(spec), encoder_batch(spec)
    pixels = batch.image_NYXC.view(-1, 4, 4, 4, 4, 3)
    hidden = batch.patch_hidden_NP.view(-1, 4, 1, 4, 1, 1)
    other_batch = batch._replace(image_NYXC=torch.where(hidden, 255 - pixels, pixels).view_as(batch.image_NYXC))
    for values, other_values in zip(losses(model, batch), losses(model, other_batch), strict=True):
        torch.testing.assert_close(values, other_values)


def test_patches_are_squares_in_reading_order():
    image = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3).to(torch.uint8)
    patches = image_patches(image, 2) * 255
    assert patches.shape == (2, 6, 12)
    for number in range(6):
        row, column = divmod(number, 3)
        square = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(patches[:, number], square.flatten(1).float())


def test_a_router_by_modality_has_weights_for_each():
    """A change of the text router changes the losses of texts, but not those of images without a text."""
    spec = encoder_spec(model__encoder__routers="per_modality")
    model, batch = build_encoder(spec), encoder_batch(spec)
    first_losses = dict(zip(spec.loss_names, losses(model, batch), strict=True))
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.router.text.weight_ED.neg_()
    changed_losses = dict(zip(spec.loss_names, losses(model, batch), strict=True))
    torch.testing.assert_close(first_losses["images"], changed_losses["images"], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(first_losses["texts"], changed_losses["texts"]).any()


def test_the_loss_of_matching_is_that_of_two_classifications():
    head = MatchHead(6, 4)
    torch.nn.init.normal_(head.image.weight)
    torch.nn.init.normal_(head.text.weight)
    torch.nn.init.constant_(head.log_scale, 1.3)
    image, text = torch.randn(2, 5, 6)
    values = head(image, text)
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (image @ head.image.weight.T, text @ head.text.weight.T))
    logits = torch.exp(torch.tensor(1.3)) * a @ b.T
    expected = [
        (logits[i].logsumexp(0) - logits[i, i] + logits[:, i].logsumexp(0) - logits[i, i]) / 2 for i in range(5)
    ]
    torch.testing.assert_close(values, torch.stack(expected))
    assert head(image[:0], text[:0]).shape == (0,)


@pytest.mark.parametrize("recompute", ["experts", "exchange", "block"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_recomputation_keeps_losses_and_gradients(recompute, experts):
    results = []
    for value in ("none", recompute):
        spec = encoder_spec(
            model__dropout=0.1,
            model__attention_dropout=0.1,
            model__moe={**EXPERTS[experts], "expert_dropout": 0.2 if experts == "smear" else 0},
            train__recompute=value,
        )
        spec = spec.model_copy(update={"model": spec.computed_model})
        model = build_encoder(spec).train()
        model.recompute = value
        output = model(encoder_batch(spec), noise=Noise(0, 3))
        sum(loss.sum for loss in output.losses).backward()
        results.append((output.losses, [p.grad for p in model.parameters()]))
    (expected, expected_gradients), (recomputed, gradients) = results
    for a, b in zip(expected, recomputed, strict=True):
        torch.testing.assert_close(a.value_I, b.value_I)
    for a, b in zip(expected_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "changes", [{"model__encoder__routers": "per_modality"}, {"model__moe": SMEAR}], ids=["per modality", "smear"]
)
def test_every_parameter_has_a_gradient(changes):
    spec = encoder_spec(**changes)
    model = build_encoder(spec).train()
    output = model(encoder_batch(spec))
    sum(loss.sum for loss in output.losses).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.filterwarnings("default")  # tracing gives rise to warnings inside torch
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.long
def test_blocks_are_compiled_once(experts):
    """All equal blocks share their compiled code, whatever the numbers of masked patches and tokens."""
    spec = encoder_spec(model__layers=4, model__moe=EXPERTS[experts])
    model = build_encoder(spec)
    batches = [encoder_batch(spec, micro_batch) for micro_batch in range(3)]
    expected = [losses(model, batch) for batch in batches]
    torch._dynamo.reset()
    counters.clear()
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    for batch, expected_losses in zip(batches, expected, strict=True):
        for values, expected_values in zip(losses(model, batch), expected_losses, strict=True):
            torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-5)
    # One graph is for a block without experts, and one for the others.
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model__rope_theta": 500_000.0}, "rope_theta would be ignored"),
        ({"model__document_masks": True}, "document_masks is for decoders"),
        ({"model__tied_embeddings": True}, "set tied_embeddings to false"),
        ({"model__encoder": None, "data__sources": TEXTS, "data__parts": {}}, "data.images is for a model with"),
    ],
)
def test_keys_that_a_model_would_ignore_are_refused(changes, error):
    with pytest.raises(ValidationError, match=error):
        encoder_spec(**{"data__images": {"min_crop": 0.7}, **changes})
