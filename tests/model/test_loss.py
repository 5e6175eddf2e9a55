"""Tests of the chunked loss, against the loss from all logits and against torch's own fused loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.model.loss import Targets, chunked_loss, full_loss

CPU = torch.device("cpu")


def draw_inputs(batch, length, width, vocab_size, seed=0):
    """Return hidden states, weights and targets; about a fifth of the targets are masked out of the loss."""
    generator = torch.Generator().manual_seed(seed)
    x_BTM = torch.randn(batch, length, width, generator=generator)
    weight_VM = torch.randn(vocab_size, width, generator=generator) / width**0.5
    token_BT = torch.randint(vocab_size, (batch, length), generator=generator)
    return x_BTM, weight_VM, Targets(token_BT, torch.rand(batch, length, generator=generator) > 0.2)


def loss_and_gradients(compute_loss, x_BTM, weight_VM, scale=0.37):
    """Return the sum of the losses, each token's loss, and the gradients of the sum times `scale`."""
    x_BTM, weight_VM = (t.clone().requires_grad_() for t in (x_BTM, weight_VM))
    loss = compute_loss(x_BTM, weight_VM)
    (loss.sum * scale).backward()
    return loss.sum.detach(), loss.token_BT, x_BTM.grad, weight_VM.grad


def both_losses(targets, chunk_rows):
    """Return two functions, which compute the loss from all logits and the chunked loss."""
    return (
        lambda x_BTM, weight_VM: full_loss(F.linear(x_BTM, weight_VM), targets),
        lambda x_BTM, weight_VM: chunked_loss(x_BTM, weight_VM, targets, chunk_rows),
    )


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 24), st.integers(2, 90), st.integers(1, 70), st.integers(0, 9)
)
def test_any_chunk_gives_the_loss_and_gradients_of_all_logits(batch, length, width, vocab_size, chunk_rows, seed):
    x_BTM, weight_VM, targets = draw_inputs(batch, length, width, vocab_size, seed)
    expected, actual = (loss_and_gradients(function, x_BTM, weight_VM) for function in both_losses(targets, chunk_rows))
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        assert actual_tensor.dtype == expected_tensor.dtype
        torch.testing.assert_close(actual_tensor, expected_tensor, rtol=1e-5, atol=1e-6)


def test_mean_loss_is_equal_to_that_of_all_logits_within_a_millionth():
    x_BTM, weight_VM, targets = draw_inputs(2, 256, 64, 4096)
    expected, actual = (function(x_BTM, weight_VM).sum for function in both_losses(targets, 96))
    assert actual / targets.counts_BT.sum() == pytest.approx(float(expected / targets.counts_BT.sum()), abs=1e-6)


def test_gradients_in_bfloat16_are_closer_to_float64_than_those_of_all_logits():
    """Sums over chunks are in float32. With all logits, a product in bfloat16 rounds the same sums."""
    x_BTM, weight_VM, targets = draw_inputs(2, 192, 48, 700)
    [*_, dx, dweight] = loss_and_gradients(
        lambda x, weight: full_loss(F.linear(x, weight), targets), x_BTM.double(), weight_VM.double()
    )
    errors = []
    for function in both_losses(targets, 64):
        with torch.autocast("cpu", torch.bfloat16):
            _, _, actual_dx, actual_dweight = loss_and_gradients(function, x_BTM, weight_VM)
        assert actual_dx.dtype == actual_dweight.dtype == torch.float32
        errors.append([float((a - e).norm() / e.norm()) for a, e in ((actual_dx, dx), (actual_dweight, dweight))])
    full_errors, chunked_errors = errors
    assert max(chunked_errors) < 1e-2
    assert all(chunked <= 1.1 * full for chunked, full in zip(chunked_errors, full_errors, strict=True))


def test_torchs_fused_loss_agrees():
    """torch has the function from 2.12 on. It takes no mask, so masked targets get the index that it ignores."""
    fused_loss = getattr(F, "linear_cross_entropy", None)
    if fused_loss is None:
        pytest.skip("this torch has no linear_cross_entropy")
    x_BTM, weight_VM, targets = draw_inputs(2, 40, 32, 300)
    ignored_BT = targets.token_BT.masked_fill(~targets.counts_BT, -100)
    actual_sum, _, *actual = loss_and_gradients(both_losses(targets, 16)[1], x_BTM, weight_VM, scale=1.0)
    x_BTM, weight_VM = (t.requires_grad_() for t in (x_BTM, weight_VM))
    expected = fused_loss(x_BTM.flatten(0, 1), weight_VM, ignored_BT.flatten(), reduction="sum")
    gradients = torch.autograd.grad(expected, (x_BTM, weight_VM))
    torch.testing.assert_close(actual_sum, expected.detach(), rtol=1e-6, atol=0)
    for actual_tensor, expected_tensor in zip(actual, gradients, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor, rtol=1e-5, atol=1e-6)


def test_gradients_are_computed_only_for_what_needs_them():
    x_BTM, weight_VM, targets = draw_inputs(1, 12, 8, 30)
    loss = chunked_loss(x_BTM, weight_VM.requires_grad_(), targets, 5)
    loss.sum.backward()
    assert x_BTM.grad is None
    assert weight_VM.grad is not None
    with torch.no_grad():
        assert not chunked_loss(x_BTM, weight_VM, targets, 5).sum.requires_grad


@pytest.mark.long
def test_peak_memory_is_at_most_a_fifth():
    """The peak of the chunked loss with its gradients is compared with that of the loss from all logits, for 2,048
    tokens of width 512 and a vocabulary of 32,768."""
    x_BTM, weight_VM, targets = draw_inputs(1, 2048, 512, 32768)
    leaves = x_BTM.requires_grad_(), weight_VM.requires_grad_()

    def peak(function):
        return peak_bytes(lambda: torch.autograd.grad(function(*leaves).sum, leaves), CPU)

    full_bytes, chunked_bytes = (peak(function) for function in both_losses(targets, 128))
    assert full_bytes > 800e6
    assert chunked_bytes <= 0.2 * full_bytes
