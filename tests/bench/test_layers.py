import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_ray.bench.layers import LayerCase, LayerShape, has_masks, our_layers
from mhmoe_ray.errors import SpecError

SMALL = LayerShape(tokens=24, d_model=48, experts=4, top_k=2, d_expert=96)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_run_with_equal_cost(dtype):
    # The kernel is `grouped`, because FlopCounterMode counts its matrix products.
    layers, skipped = our_layers(SMALL, [2, 3], True, ["grouped"], CPU)
    assert [layer.name for layer in layers][:2] == ["dense", "SMoE"]
    assert [layer.name for layer in layers if has_masks(layer.moe)] == ["SMoE static", "MH-MoE h 2 static"]
    assert not skipped
    products = {}
    for layer in layers:
        case = LayerCase(layer, SMALL, dtype, CPU)
        with FlopCounterMode(display=False) as counter:
            y = case.run()
        assert y.shape == (1, 24, 48)
        assert torch.isfinite(y).all()
        assert case.x_BTM.grad is None
        products[layer.name] = counter.get_total_flops()
    for name in ("SMoE", "MH-MoE h 2", "MH-MoE h 3", "fine-grained"):
        # The tolerances allow for rounded widths, routers and the combination of outputs, which matter at such small
        # sizes. They do not allow for an unmatched MH-MoE, which has 1.19 times the FLOPs of SMoE.
        assert products[name] == pytest.approx(products["dense"], rel=0.25), name
        assert products[name] == pytest.approx(products["SMoE"], rel=0.08), name


def test_runnable_kernels_compute_each_layer_and_others_are_skipped():
    layers, skipped = our_layers(SMALL, [2], False, ["reference", "grouped", "megablocks"], CPU)
    kernel_by_layer = {layer.name: layer.moe.kernel for layer in layers if layer.moe}
    assert kernel_by_layer["SMoE, reference"] == "reference"
    assert kernel_by_layer["MH-MoE h 2, grouped"] == "grouped"
    assert len(kernel_by_layer) == 2 * 4
    [skipped_case] = skipped
    assert skipped_case.name == "kernel megablocks"
    assert "needs CUDA" in skipped_case.reason
    outputs = {layer.name: LayerCase(layer, SMALL, "float32", CPU).run() for layer in layers}
    torch.testing.assert_close(outputs["SMoE, reference"], outputs["SMoE, grouped"])


@pytest.mark.parametrize(
    ("heads", "kernels", "message"),
    [
        ([5], ["auto"], "does not split"),
        ([0], ["auto"], "does not split"),
        ([2], ["quick"], "none of that name"),
        ([2], ["capacity"], "--static"),
        ([2], ["megablocks"], "needs CUDA"),
    ],
)
def test_impossible_layers_are_refused(heads, kernels, message):
    with pytest.raises(SpecError, match=message):
        our_layers(SMALL, heads, False, kernels, CPU)


@pytest.mark.cpu
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unsupported_precision_is_reported_before_machine(device):
    with pytest.raises(SpecError, match="kernel cpp computes in bfloat16, not in float32"):
        our_layers(SMALL, [2], False, ["cpp"], torch.device(device), "float32")
