"""Tests of AdamW with moments in bfloat16."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.distributed import rounded_adamw
from mhmoe_ray.distributed.rounded_adamw import RoundedAdamW, ValuePosition, random_bits, round_to_bfloat16

CPU = torch.device("cpu")
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "fused": True}


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(0, 0xFFFF))
def test_a_value_is_rounded_to_one_of_its_neighbours(value, bits):
    rounded = round_to_bfloat16(torch.tensor([value]), torch.tensor([bits], dtype=torch.int32))
    assert rounded.dtype == torch.bfloat16
    pattern = torch.tensor([value]).view(torch.int32).item()
    left_out = pattern & 0xFFFF
    expected = (pattern & ~0xFFFF) + (0x10000 if left_out + bits > 0xFFFF else 0)
    assert rounded.float().view(torch.int32).item() == expected


def test_values_of_bfloat16_stay_the_same_with_any_bits():
    values = torch.randn(1000).bfloat16()
    for bits in (0, 0xFFFF):
        assert torch.equal(round_to_bfloat16(values.float(), torch.full((1000,), bits, dtype=torch.int32)), values)


def test_rounded_values_have_the_mean_of_the_values():
    """A value at a quarter of the way between two neighbours is rounded up once in four times."""
    bits = random_bits(7, 0, 1 << 18, CPU)
    values = torch.full((1 << 18,), 1 + 1 / 512)
    for part in (bits & 0xFFFF, (bits >> 16) & 0xFFFF):
        share_up = (round_to_bfloat16(values, part) > 1).double().mean().item()
        assert share_up == pytest.approx(0.25, abs=0.005)


def test_each_bit_is_random_and_depends_on_position_and_key():
    bits, other_bits = (random_bits(key, 0, 1 << 18, CPU) for key in (1, 2))
    for samples in (bits, bits ^ other_bits, bits[1:] ^ bits[:-1]):
        means = torch.stack([(samples >> bit) & 1 for bit in range(32)]).double().mean(1)
        assert torch.allclose(means, torch.full((32,), 0.5, dtype=torch.float64), atol=0.006)


@pytest.mark.parametrize("start", [0, 12345, (1 << 33) + 7])
def test_bits_depend_only_on_the_position_in_the_full_tensor(start):
    bits = random_bits(3, start, 100, CPU)
    assert torch.equal(bits[40:], random_bits(3, start + 40, 60, CPU))
    assert not torch.equal(bits, random_bits(3, start + 1, 100, CPU))


def test_shards_are_updated_like_the_full_tensor(monkeypatch):
    """A shard may begin at any row of the tensor, and the pieces that are updated at a time may begin at any value."""
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = (torch.randn(10, 7, generator=generator) for _ in range(5))
    results = []
    for bounds, piece in (([0, 10], 1 << 20), ([0, 3, 4, 10], 16)):
        monkeypatch.setattr(rounded_adamw, "PIECE_VALUES", piece)
        shards = [torch.nn.Parameter(weight[a:b].clone()) for a, b in pairwise(bounds)]
        positions = {p: ValuePosition("w", 7 * a) for p, a in zip(shards, bounds, strict=False)}
        optimizer = RoundedAdamW([{"params": shards}], positions, 1, **OPTIONS)
        for gradient in gradients:
            for shard, start in zip(shards, bounds, strict=False):
                shard.grad = gradient[start : start + len(shard)].clone()
            optimizer.step()
        states = [optimizer.state[p] for p in shards]
        assert all(state["step"] == 4 and state["exp_avg"].dtype == torch.bfloat16 for state in states)
        results.append([torch.cat(shards), *(torch.cat([s[m] for s in states]) for m in ("exp_avg", "exp_avg_sq"))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_moments_follow_those_in_float32_without_bias():
    """Rounding to nearest would lose most changes of the second moment here: they are less than half a step of
    bfloat16."""
    count, steps = 20_000, 120
    narrow, wide = (torch.nn.Parameter(torch.zeros(count)) for _ in range(2))
    optimizers = (
        RoundedAdamW([{"params": [narrow]}], {narrow: ValuePosition("w", 0)}, 0, **OPTIONS),
        torch.optim.AdamW([wide], **OPTIONS),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        gradient = 1 + 0.05 * torch.randn(count, generator=generator)
        for parameter, optimizer in zip((narrow, wide), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    for moment in ("exp_avg", "exp_avg_sq"):
        expected, actual = optimizers[1].state[wide][moment], optimizers[0].state[narrow][moment].float()
        assert (actual / expected).mean().item() == pytest.approx(1, abs=5e-4)
    torch.testing.assert_close(narrow, wide, rtol=2e-2, atol=1e-4)
