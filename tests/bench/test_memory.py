from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mhmoe_ray.bench.layers import Case, Shape, our_layers
from mhmoe_ray.bench.measure import footprint, highest, peak_bytes

CPU = torch.device("cpu")


@given(st.lists(st.integers(-9, 9)))
def test_highest_is_the_largest_sum_from_the_start(changes):
    assert highest(changes) == max(accumulate(changes, initial=0))


def test_what_is_released_makes_room_and_what_was_there_before_is_not_counted():
    before = torch.zeros(1 << 20)

    def run():
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first
        third = torch.empty(500)
        return before.sum() + second.numel() + third.numel()

    assert peak_bytes(run, CPU) == 4 * 3000


def test_a_linear_layer_as_counted_by_hand():
    layer = nn.Linear(96, 160, bias=False)
    x = torch.randn(32, 96, requires_grad=True)

    def backward(y):
        y.backward(torch.ones_like(y))
        x.grad = layer.weight.grad = None

    found = footprint(layer, lambda: layer(x), backward)
    assert found.kept == 4 * 32 * 96  # x; the weight is not counted
    # The result and its gradient, and both gradients that come of them.
    assert found.peak == 4 * (2 * 32 * 160 + 32 * 96 + 160 * 96)


def test_a_dense_swiglu_as_counted_by_hand():
    T, d, f = 64, 48, 160
    case = Case(our_layers(Shape(T, d, 4, 2, f // 2), [], False, ["auto"], CPU)[0][0], Shape(T, d), "float32", CPU)
    found = footprint(case.module, case.forward, case.backward)
    assert found.kept == 4 * T * (d + 4 * f)  # x; gate, its silu, up, their product
    # Highest in backward, where hidden rows meet: all that is kept but x, y and its gradient, the gradient of the down
    # projection, and the gradients of the product and of one of its factors.
    assert found.peak == 4 * (T * (2 * d + 6 * f) + d * f)


@pytest.mark.parametrize("static", [False, True])
def test_watching_what_is_kept_does_not_change_the_peak(static):
    shape = Shape(64, 48, 4, 2, 96)
    for layer in our_layers(shape, [2], static, ["auto"], CPU)[0]:
        case = Case(layer, shape, "float32", CPU)
        found = footprint(case.module, case.forward, case.backward)
        assert found.peak == peak_bytes(lambda case=case: case.backward(case.forward()), CPU), layer.name
        assert found.kept < found.peak


def test_memory_of_static_routing_grows_with_the_square_and_dropless_in_a_line():
    def peaks(name):
        for tokens in (128, 256, 512):
            shape = Shape(tokens, 48, 4, 2, 96)
            [layer] = (one for one in our_layers(shape, [2], True, ["auto"], CPU)[0] if one.name == name)
            case = Case(layer, shape, "float32", CPU)
            yield peak_bytes(case.run, CPU)

    growth = {}
    for name in ("SMoE", "MH-MoE h 2", "SMoE static", "MH-MoE h 2 static"):
        low, middle, high = peaks(name)
        growth[name] = (high - middle) / (middle - low)  # 2 of a line, 4 of a square, whatever does not grow
    assert growth["SMoE"] == pytest.approx(2, rel=0.1)
    assert growth["MH-MoE h 2"] == pytest.approx(2, rel=0.1)
    assert growth["SMoE static"] > 3.3
    assert growth["MH-MoE h 2 static"] > 3.3


def test_functions_beside_a_module_are_watched_too():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    found = footprint(layer, lambda: F.silu(layer(x)), lambda y: y.backward(torch.ones_like(y)))
    assert found.kept == 4 * (4 * 8 + 4 * 8)  # x, and silu's argument


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_card_what_was_there_before_is_not_counted():
    device = torch.device("cuda")
    before = torch.zeros(1 << 20, device=device)

    def run():
        first = torch.empty(1 << 20, device=device)
        second = torch.empty(2 << 20, device=device)
        del first
        return before + second[: 1 << 20]

    assert peak_bytes(run, device) == 4 * (3 << 20)
