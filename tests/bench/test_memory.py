import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mhmoe_ray.bench.layers import LayerCase, LayerShape, our_layers
from mhmoe_ray.bench.measure import footprint, peak_bytes

CPU = torch.device("cpu")


def test_peak_excludes_released_and_earlier_memory():
    earlier_tensor = torch.zeros(1 << 20)

    def run():
        released_tensor = torch.empty(1000)
        second_tensor = torch.empty(2000)
        del released_tensor
        third_tensor = torch.empty(500)
        return earlier_tensor.sum() + second_tensor.numel() + third_tensor.numel()

    assert peak_bytes(run, CPU) == 4 * 3000


def test_linear_layer_matches_hand_count():
    layer = nn.Linear(96, 160, bias=False)
    x = torch.randn(32, 96, requires_grad=True)

    def backward(y):
        y.backward(torch.ones_like(y))
        x.grad = layer.weight.grad = None

    memory = footprint(layer, lambda: layer(x), backward)
    assert memory.saved_bytes == 4 * 32 * 96  # x is saved; the weight is not counted
    # At the peak there are the result and its gradient, and the gradients of x and of the weight.
    assert memory.peak_bytes == 4 * (2 * 32 * 160 + 32 * 96 + 160 * 96)


def test_dense_swiglu_matches_hand_count():
    T, d, f = 64, 48, 160
    case = LayerCase(
        our_layers(LayerShape(T, d, 4, 2, f // 2), [], False, ["auto"], CPU)[0][0], LayerShape(T, d), "float32", CPU
    )
    memory = footprint(case.module, case.forward, case.backward)
    assert memory.saved_bytes == 4 * T * (d + 4 * f)  # x, gate, silu(gate), up and silu(gate) * up are saved
    # The peak is in the backward pass. At that time there are the saved hidden rows, y and its gradient, the gradient
    # of the down projection, and the gradients of silu(gate) * up and of one of its factors.
    assert memory.peak_bytes == 4 * (T * (2 * d + 6 * f) + d * f)


@pytest.mark.parametrize("static", [False, True])
def test_recording_saved_tensors_does_not_change_peak(static):
    shape = LayerShape(64, 48, 4, 2, 96)
    for layer in our_layers(shape, [2], static, ["auto"], CPU)[0]:
        case = LayerCase(layer, shape, "float32", CPU)
        memory = footprint(case.module, case.forward, case.backward)
        assert memory.peak_bytes == peak_bytes(lambda case=case: case.backward(case.forward()), CPU), layer.name
        assert memory.saved_bytes < memory.peak_bytes


def test_static_memory_is_quadratic_and_dropless_memory_linear():
    def layer_peaks(name):
        for tokens in (128, 256, 512):
            shape = LayerShape(tokens, 48, 4, 2, 96)
            [layer] = (
                candidate for candidate in our_layers(shape, [2], True, ["auto"], CPU)[0] if candidate.name == name
            )
            case = LayerCase(layer, shape, "float32", CPU)
            yield peak_bytes(case.run, CPU)

    growth = {}
    for name in ("SMoE", "MH-MoE h 2", "SMoE static", "MH-MoE h 2 static"):
        low, middle, high = layer_peaks(name)
        # The ratio is 2 for linear and 4 for quadratic growth, and constant bytes cancel.
        growth[name] = (high - middle) / (middle - low)
    assert growth["SMoE"] == pytest.approx(2, rel=0.1)
    assert growth["MH-MoE h 2"] == pytest.approx(2, rel=0.1)
    assert growth["SMoE static"] > 3.3
    assert growth["MH-MoE h 2 static"] > 3.3


def test_functions_outside_module_are_counted():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    memory = footprint(layer, lambda: F.silu(layer(x)), lambda y: y.backward(torch.ones_like(y)))
    assert memory.saved_bytes == 4 * (4 * 8 + 4 * 8)  # x and the argument of silu are saved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_peak_excludes_earlier_memory():
    device = torch.device("cuda")
    earlier_tensor = torch.zeros(1 << 20, device=device)

    def run():
        released_tensor = torch.empty(1 << 20, device=device)
        second_tensor = torch.empty(2 << 20, device=device)
        del released_tensor
        return earlier_tensor + second_tensor[: 1 << 20]

    assert peak_bytes(run, device) == 4 * (3 << 20)
