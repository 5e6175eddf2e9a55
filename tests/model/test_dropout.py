"""Tests of dropout: its mean, the tensors that it applies to, and the generators of its random draws."""

import pytest
import torch
import torch.nn.functional as F

from mhmoe_ray.model.attention import Attention
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import EMBEDDING, Noise, dropout
from mhmoe_ray.model.rotary import rotary_tables
from mhmoe_ray.model.trunk import routing_loss
from mhmoe_ray.spec import ModelSpec, MoESpec

CPU = torch.device("cpu")


def build_decoder(moe=True, **fields):
    """Return a float64 decoder with two layers, with experts or dense; `fields` are keys of ModelSpec."""
    experts = MoESpec(heads=2, experts=4, top_k=2, d_expert=6, d_shared=5) if moe else None
    spec = ModelSpec(
        **{"vocab_size": 30, "d_model": 16, "layers": 2, "attention_heads": 2, "d_ff": 12, "moe": experts, **fields}
    )
    model = Decoder(spec)
    init_weights(model, 1)
    return model.double()


def random_tokens(batch=3, length=9):
    return torch.randint(30, (batch, length), generator=torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_zeroes_or_scales_entries_so_that_the_mean_stays(rate, dtype):
    x = torch.linspace(1, 2, 40_000, dtype=dtype)
    y = dropout(x, rate, generator())
    assert y.dtype == dtype
    keep_mask = y != 0
    torch.testing.assert_close(y[keep_mask], x[keep_mask] / (1 - rate))
    # For a rate of 0.5, the tolerance is four standard deviations of a share of 40,000 entries.
    assert keep_mask.double().mean().item() == pytest.approx(1 - rate, abs=0.01)
    assert torch.equal(keep_mask, dropout(x.double(), rate, generator()) != 0), (
        "the dtype must not decide what is dropped"
    )
    assert dropout(x, rate, None) is x


@torch.no_grad()
def test_each_expert_of_a_sub_token_has_its_own_dropout_mask():
    """Each entry of a sub-token's output is g1 f1 / (1 - p) or 0, plus g2 f2 / (1 - p) or 0, where g is the gate of an
    expert and f its output. At p = 1/2 each of the four sums has a share of 1/4."""
    [layer] = build_decoder(dropout=0.5).moe_layers()
    x_ND = torch.randn(1, 8, dtype=torch.float64, generator=generator()).expand(4000, 8)
    routing = layer.router(x_ND)
    [first_output, second_output] = (
        layer.experts.compute(x_ND[:1], routing.expert_NK[:1, k : k + 1], routing.gate_NK[:1, k : k + 1])
        for k in (0, 1)
    )
    output, _ = layer._run_experts(x_ND, routing, generator(), None)
    sums = torch.stack([0 * first_output, 2 * first_output, 2 * second_output, 2 * (first_output + second_output)])
    is_sum = (output[None] - sums).abs() < 1e-12
    assert is_sum.any(0).all()
    shares = is_sum.double().mean(1)
    torch.testing.assert_close(shares, torch.full_like(shares, 0.25), atol=0.03, rtol=0)


@torch.no_grad()
def test_dropout_applies_to_the_output_of_a_shared_expert():
    [layer] = build_decoder(dropout=0.5).moe_layers()
    # The routed experts then contribute nothing, because the bias of the merge projection is 0 initially.
    layer.merge.weight.zero_()
    x = torch.randn(1, 4000, 16, dtype=torch.float64, generator=generator())
    y, shared = layer(x, generator())[0], layer.shared(x)
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], 2 * shared[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def test_attention_weights_are_dropped_and_their_mean_stays():
    spec = build_decoder(attention_dropout=0.3).spec
    attention = Attention(spec).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=generator())
    tables = rotary_tables(spec, torch.arange(5))
    expected = attention(x, tables)
    outputs = attention(x.expand(6000, -1, -1), tables, None, generator())
    torch.testing.assert_close(outputs.mean(0, keepdim=True), expected, atol=0.02, rtol=0)
    # The first token attends only to itself, so each head gives its scaled value or 0.
    assert len(outputs[:, 0].round(decimals=9).unique(dim=0)) == 2**spec.attention_heads


@torch.no_grad()
def test_dropout_neither_reads_nor_advances_the_default_generator():
    model, x = build_decoder(attention_dropout=0.3, dropout=0.2), random_tokens()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.get_rng_state()
        results.append(model(x, noise=Noise(0, 0)).logits_BTV)
        assert torch.equal(torch.get_rng_state(), expected)
    assert torch.equal(*results)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_dropout_masks_apply_to_the_embedding_and_to_attention_and_feed_forward_outputs(backbone):
    model, x, rate = build_decoder(moe=False, dropout=0.4, backbone=backbone), random_tokens(), 0.4
    noise = Noise(5, 7)

    def mask(tensor, generator_):
        return (torch.rand(tensor.shape, generator=generator_) >= rate) / (1 - rate)

    h = model.embedding(x) * (4 if backbone == "subln" else 1)
    h = h * mask(h, noise.generator(EMBEDDING, CPU))
    for i, block in enumerate(model.blocks):
        generator_ = noise.generator(i, CPU)
        y = block.attention(block.attention_norm(h), rotary_tables(model.spec, torch.arange(9)))
        h = h + y * mask(y, generator_)
        y = block.ffn(block.ffn_norm(h))
        h = h + y * mask(y, generator_)
    torch.testing.assert_close(model(x, noise=noise).logits_BTV, F.linear(model.norm(h), model.embedding.weight))


@torch.no_grad()
@pytest.mark.parametrize("rates", [{"dropout": 0.1}, {"attention_dropout": 0.1}])
@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_dropout_depends_on_seed_and_micro_batch_and_is_off_in_evaluation(rates, backbone):
    model, x = build_decoder(**rates, backbone=backbone), random_tokens()

    def run(seed, micro_batch):
        return model(x, noise=Noise(seed, micro_batch)).logits_BTV

    assert torch.equal(run(3, 8), run(3, 8))
    assert not torch.equal(run(3, 8), run(3, 9))
    assert not torch.equal(run(3, 8), run(4, 8))
    assert torch.equal(model(x).logits_BTV, build_decoder(backbone=backbone)(x).logits_BTV)


def test_random_draws_differ_between_layers():
    noise = Noise(3, 8)
    draws = [torch.rand(4, generator=noise.generator(layer, CPU)).tolist() for layer in (EMBEDDING, 0, 1, 2)]
    assert len({tuple(d) for d in draws}) == 4


@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_gradients_under_fixed_masks_are_those_of_finite_differences(backbone):
    model, x = build_decoder(dropout=0.3, attention_dropout=0.3, backbone=backbone), random_tokens()

    def loss():
        output = model(x[:, :-1], noise=Noise(0, 4))
        cross = F.cross_entropy(output.logits_BTV.flatten(0, 1), x[:, 1:].flatten())
        return cross + routing_loss(model.spec, output.routing)

    loss().backward()
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, dtype=p.dtype, generator=generator(len(name)))
        slope, step = float((p.grad * direction).sum()), 1e-6
        with torch.no_grad():
            p.add_(direction, alpha=step)
            upper_loss = loss().item()
            p.add_(direction, alpha=-2 * step)
            lower_loss = loss().item()
            p.add_(direction, alpha=step)
        assert (upper_loss - lower_loss) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-7), name
