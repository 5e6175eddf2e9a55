"""Tests of router smear, which averages all experts into one for each sample."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_ray.families.encoder.data.batches import BatchMaker
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise, seeded_generator
from mhmoe_ray.model.smear import SmearRouter
from mhmoe_ray.planner.expert_step import expert_step
from mhmoe_ray.planner.family import EXPERTS
from mhmoe_ray.planner.sizes import block_sizes, compute_sizes, flops_per_token, merge_macs, model_parts
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.support.encoders import SMEAR, encoder_batch, encoder_spec, part_samples
from tests.support.specs import tiny_spec


def build_smear(**changes):
    """Return a spec with router smear, and its encoder in evaluation mode, with a router that has clear preferences."""
    spec = encoder_spec(**{"model__moe": SMEAR, **changes})
    model = build_model(spec.model)
    init_weights(model, 0)
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.router.scores.row_gain_D.fill_(0.5)
            layer.router.scores.norm_bias_D.normal_(generator=torch.Generator().manual_seed(1))
    return spec, model.eval()


def expected_probabilities(layer, rows_UM):
    """Return the probabilities of experts for one sample, whose rows without padding are `rows_UM`."""
    scores = layer.router.scores

    def normalize(x):
        return (x - x.mean()) / (x.var(unbiased=False) + scores.eps).sqrt()

    mean_M = normalize(torch.stack([*rows_UM]).sum(0) / len(rows_UM)) * scores.norm_weight_D + scores.norm_bias_D
    return torch.stack([mean_M @ (normalize(row_M) * scores.row_gain_D) for row_M in scores.weight_ED]).softmax(0)


def expected_outputs(layer, rows_UM, probability_E):
    """Return the outputs of one sample's averaged expert at some positions."""
    experts = layer.experts

    def average(stack):
        return sum(p * weight for p, weight in zip(probability_E, stack, strict=True))

    hidden_UF = F.gelu(rows_UM @ average(experts.fc1_EFD).T + average(experts.fc1_bias_EF))
    mean_U1, variance_U1 = hidden_UF.mean(1, keepdim=True), hidden_UF.var(1, unbiased=False, keepdim=True)
    normed_UF = (hidden_UF - mean_U1) / (variance_U1 + 1e-5).sqrt()
    normed_UF = normed_UF * average(experts.norm_weight_EF) + average(experts.norm_bias_EF)
    return normed_UF @ average(experts.fc2_EDF).T + average(experts.fc2_bias_ED)


def test_each_sample_is_computed_by_its_average_of_experts():
    _, model = build_smear()
    [layer] = model.moe_layers()
    sets = [torch.randn(2, 5, 32), torch.randn(3, 7, 32)]
    mask = torch.zeros(3, 1, 1, 7)
    real_positions = [range(7), range(2), [0, 1, 2, 3, 6]]
    for number, positions in enumerate(real_positions):
        mask[number, ..., [u for u in range(7) if u not in positions]] = float("-inf")
    outputs, routing = layer(sets, [None, mask])
    samples = [(sets[0][i], range(5), outputs[0][i]) for i in range(2)]
    samples += [(sets[1][i], real_positions[i], outputs[1][i]) for i in range(3)]
    count_E = torch.zeros(4, dtype=torch.int64)
    for number, (rows_UM, positions, output_UM) in enumerate(samples):
        probability_E = expected_probabilities(layer, rows_UM[list(positions)])
        torch.testing.assert_close(routing.gate_NK[number], probability_E)
        torch.testing.assert_close(output_UM, expected_outputs(layer, rows_UM, probability_E))
        count_E[probability_E.argmax()] += len(rows_UM)
    # A batch of equal preferences would not show which expert a position counts for.
    assert len(count_E.nonzero()) > 1
    assert torch.equal(routing.count_E, count_E)
    assert not routing.balance_loss
    assert not routing.z_loss
    assert not routing.dropped_routes


def test_both_halves_of_a_pair_have_one_expert_and_other_samples_their_own():
    """The router reads the mean of a sample's positions without padding. A masked pair of an image and a text is one
    sample, but the image and the text of a contrastive pair are two."""
    spec, model = build_smear()
    batch, block = encoder_batch(spec), model.blocks[1]
    values = {}
    for name, module in (("image", block.image.ffn_norm), ("text", block.text.ffn_norm)):
        module.register_forward_hook(lambda _, __, y, name=name: values.update({name: y}))
    block.moe.router.register_forward_hook(lambda _, inputs, __: values.update(means=inputs[0]))
    [routing] = model(batch).routing
    images = [*values["image"]]
    texts = [rows[is_token] for rows, is_token in zip(values["text"], batch.is_token_NT, strict=True)]
    samples = [*texts[:3], *images[:2]]
    samples += [torch.cat([images[2 + i], texts[3 + i]]) for i in range(4)]
    samples += [*images[6:], *texts[7:]]
    expected_means = torch.stack([rows.mean(0) for rows in samples])
    torch.testing.assert_close(values["means"], expected_means)
    assert routing.gate_NK.shape == (3 + 2 + 4 + 3 + 3, 4)
    assert routing.count_E.sum() == spec.tokens_per_micro_batch


def test_a_single_expert_is_that_of_a_plain_layer():
    spec, model = build_smear(model__moe__experts=1)
    plain = build_model(encoder_spec(model__moe={**SMEAR, "experts": 1, "router": "linear"}).model)
    init_weights(plain, 0)
    tensors = {name: t for name, t in model.named_tensors().items() if ".router." not in name}
    assert set(plain.named_tensors()) - set(tensors) == {"blocks.1.moe.router.scores.weight_ED"}
    plain.load_state_dict(tensors, strict=False)
    batch = encoder_batch(spec)
    for loss, expected in zip(model(batch).losses, plain.eval()(batch).losses, strict=True):
        torch.testing.assert_close(loss.value_I, expected.value_I)


@pytest.mark.parametrize("experts", ["beside", "replace"])
@pytest.mark.parametrize("d_shared", [0, 24])
def test_planned_parameters_are_those_of_the_model(experts, d_shared):
    if d_shared and experts == "beside":
        return
    spec, model = build_smear(model__encoder__experts=experts, model__moe={**SMEAR, "d_shared": d_shared})
    counts, sizes = compute_sizes(spec.model), block_sizes(spec.model)
    assert sum(p.numel() for p in model.parameters()) == counts.parameters
    parameters = sum(p.numel() for name, p in model.blocks[1].named_parameters() if ".experts." not in name)
    assert parameters == sizes.mixture
    assert counts.expert_parameters == sum(p.numel() for p in model.moe_layers()[0].experts.parameters())


def test_planned_multiply_adds_are_those_of_the_layer():
    """The plan counts the averaged expert once per position, and the router and the averaging once per sample."""
    spec, model = build_smear()
    [layer] = model.moe_layers()
    counter = FlopCounterMode(display=False)
    with counter:
        layer([torch.randn(2, 5, 32), torch.randn(3, 7, 32)], [None, None])
    expert_macs = next(part.macs for part in model_parts(spec.model) if part.name == EXPERTS)
    # Biases and the norm are averaged by products, too.
    assert counter.get_total_flops() == 2 * ((2 * 5 + 3 * 7) * expert_macs + 5 * merge_macs(spec.model))
    step = expert_step(spec)
    assert step.flops == 2 * (spec.tokens_per_micro_batch * expert_macs + 15 * merge_macs(spec.model))
    per_token, without_merging = (
        flops_per_token(spec.model, spec.attention_length, samples) for samples in (spec.samples_per_token, 0)
    )
    added_flops = (per_token.forward - without_merging.forward) * spec.tokens_per_micro_batch
    assert added_flops == pytest.approx(2 * 15 * merge_macs(spec.model), rel=0.01)


def test_expert_dropout_leaves_experts_out_of_samples():
    router = SmearRouter(32, MoESpec.model_validate({**SMEAR, "expert_dropout": 0.5}), 1e-5)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    means = torch.randn(400, 32)
    full, dropped, repeated = (router(means, g).gate_NK for g in (None, *(seeded_generator("a") for _ in range(2))))
    assert torch.equal(dropped, repeated)
    torch.testing.assert_close(dropped.sum(1), torch.ones(400))
    is_kept = dropped > 1e-6
    assert is_kept.float().mean() == pytest.approx(0.5, abs=0.1)
    for probabilities, expected, mask in zip(dropped, full, is_kept, strict=True):
        # A sample whose experts are all dropped gets the plain average.
        if mask.all() and not torch.allclose(probabilities, expected):
            torch.testing.assert_close(probabilities, torch.full((4,), 0.25))
        else:
            torch.testing.assert_close(probabilities[mask], expected[mask] / expected[mask].sum(), rtol=1e-4, atol=1e-6)


def test_random_numbers_depend_on_seed_and_micro_batch_alone():
    spec, model = build_smear(model__moe={**SMEAR, "expert_dropout": 0.3})
    batch = encoder_batch(spec)
    noises = (Noise(0, 1), Noise(0, 1), Noise(0, 2))
    results = [[loss.value_I for loss in model(batch, noise).losses] for noise in noises]
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_a_sample_has_the_same_losses_alone():
    """A sample for masked prediction has the same losses by itself as in a micro-batch of all data parts."""
    spec, model = build_smear()
    maker = BatchMaker(spec.model, torch.device("cpu"))
    batch_losses = dict(zip(spec.loss_names, (loss.value_I for loss in model(encoder_batch(spec)).losses), strict=True))
    for number, part in enumerate(spec.parts[:3]):
        samples = part_samples(spec, part, number)
        singles = [
            [loss.value_I for loss in model(maker.make([part._replace(samples=1)], samples.rows(i, i + 1))).losses]
            for i in range(part.samples)
        ]
        for name, values in zip(part.losses, zip(*singles, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(values), batch_losses[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 2}, "splits no tokens: set heads to 1"),
        ({"top_k": 2}, "makes no choice: set top_k to 1"),
        ({"head_projection": True}, "has no projections: remove head_projection"),
        ({"jitter": 0.1}, "sends no rows to experts, so jitter would be ignored"),
        ({"capacity_factor": 1.0}, "so capacity_factor would be ignored"),
        ({"balance_weight": 0.02}, "so balance_weight would be ignored"),
        ({"z_weight": 0.1}, "so z_weight would be ignored"),
        ({"bias_rate": 0.1}, "so bias_rate would be ignored"),
        ({"groups": 2}, "so groups would be ignored"),
        ({"kernel": "grouped"}, "so kernel would be ignored"),
        ({"recompute": 1.0}, "so recompute would be ignored"),
        ({"sub_token_residual": True}, "so sub_token_residual would be ignored"),
        ({"router": "linear", "expert_dropout": 0.1}, "expert_dropout is for router smear"),
    ],
)
def test_options_of_choices_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        MoESpec.model_validate({**SMEAR, **changes})


def test_a_decoder_and_a_distributed_layer_are_refused():
    with pytest.raises(ValidationError, match="in a decoder later tokens would influence earlier ones"):
        ModelSpec.model_validate({**tiny_spec().model.model_dump(), "moe": SMEAR})
    with pytest.raises(ValidationError, match=r"set encoder\.routers to shared"):
        encoder_spec(model__moe=SMEAR, model__encoder__routers="per_modality")
    with pytest.raises(ValidationError, match=r"averages all experts of a layer, but cluster\.ep is 2: set ep to 1"):
        encoder_spec(model__moe=SMEAR, cluster={"workers": 2, "ep": 2})
