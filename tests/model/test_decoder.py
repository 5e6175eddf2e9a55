import pytest
import torch

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from tests.support.decoders import KINDS, build_decoder, random_tokens
from tests.support.paged import logits_in_parts


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_changing_a_token_changes_no_logits_before_it(heads, kind):
    moe_fields = {"sub_token_residual": True, "d_shared": 8, "router": "xmoe"} if kind else {}
    model, x = build_decoder(heads, moe=moe_fields, **kind), random_tokens(3, 20)
    expected = model(x).logits_BTV
    for t in (0, 7, 19):
        changed = x.clone()
        changed[1, t] = (changed[1, t] + 1) % 50
        logits = model(changed).logits_BTV
        # The logits are not equal bit for bit: the changed token may go to other experts, where it shifts other rows in
        # the matrix product, and the rounding depends on the place of a row.
        is_equal = ((logits - expected).abs() < 1e-12).all(-1)
        assert is_equal[1, :t].all(), "a later token reached back"
        assert ((logits - expected).abs() > 1e-9)[1, t:].any(-1).all(), "without an effect the test could not fail"
        assert is_equal[0].all(), "another sequence of the batch is touched"
        assert is_equal[2].all(), "another sequence of the batch is touched"


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_generation_gives_the_same_logits(heads, kind):
    model, x = build_decoder(heads, **kind), random_tokens(2, 17)
    expected = model(x).logits_BTV
    torch.testing.assert_close(
        logits_in_parts(model, x, [5, 1, 1, 7, 3]), expected, atol=1e-6 if kind else 1e-12, rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_depends_only_on_distance_between_tokens(kind):
    """The output of attention is the same if all positions are shifted by 1000."""
    from mhmoe_ray.model.attention import Attention
    from mhmoe_ray.model.rotary import rotary_tables

    spec = build_decoder(**kind).spec
    attention = Attention(spec).double()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    early_output, late_output = (
        attention(x, rotary_tables(spec, torch.arange(start, start + 9))) for start in (0, 1000)
    )
    torch.testing.assert_close(early_output, late_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", list(SCORES_BY_ROUTER))
def test_every_parameter_gets_a_gradient(kind, router):
    model, x = build_decoder(moe={"router": router, "projection_layers": 2}, **kind), random_tokens(4, 30)
    model(x).logits_BTV.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_xpos_scale_decays_with_distance():
    """The product of a query and keys without rotation falls with the distance, to the published value at 1,024."""
    from mhmoe_ray.model.rotary import rotary_tables

    spec = build_decoder(backbone="subln").spec
    tables = rotary_tables(spec, torch.arange(1025))
    # The root of the sum of the squares of sine and cosine is the scale of xPos, without the rotation. `product` is the
    # product of a query of ones at the last position with keys of ones.
    scale_q = (tables.q_cos_TC.square() + tables.q_sin_TC.square()).sqrt()
    scale_k = (tables.k_cos_TC.square() + tables.k_sin_TC.square()).sqrt()
    product = (scale_q[-1] * scale_k).sum(-1)
    assert (product[1:] > product[:-1]).all()
    assert product[-1] == pytest.approx(spec.head_width, rel=1e-4)
    base = (torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)
    # xPos multiplies by `base` every 512 tokens, so twice over 1,024 tokens.
    assert product[0] == pytest.approx(2 * float((base**2).sum()), rel=1e-4)


def test_xpos_stays_within_float32_up_to_the_longest_sequence():
    from mhmoe_ray.model.rotary import rotary_tables

    longest_sequence = ARCHITECTURES["subln"].longest_sequence
    tables = rotary_tables(
        build_decoder(backbone="subln").spec, torch.tensor([longest_sequence - 1, longest_sequence + 4000])
    )
    assert all(part[0].abs().max() < torch.finfo(torch.float32).max / 1000 for part in tables)
    assert tables.k_cos_TC[1].isinf().any()
