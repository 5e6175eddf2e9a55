import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_ray.bench.layers import Case, Shape, has_masks, our_layers
from mhmoe_ray.errors import SpecError

SMALL = Shape(tokens=24, d_model=48, experts=4, top_k=2, d_expert=96)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_layers_run_both_ways_and_cost_the_same(dtype):
    layers, absent = our_layers(SMALL, [2, 3], True, ["grouped"], CPU)  # whose products can be counted
    assert [layer.name for layer in layers][:2] == ["dense", "SMoE"]
    assert [layer.name for layer in layers if has_masks(layer.moe)] == ["SMoE static", "MH-MoE h 2 static"]
    assert not absent
    products = {}
    for layer in layers:
        case = Case(layer, SMALL, dtype, CPU)
        with FlopCounterMode(display=False) as counter:
            y = case.run()
        assert y.shape == (1, 24, 48)
        assert torch.isfinite(y).all()
        assert case.x_BTM.grad is None
        products[layer.name] = counter.get_total_flops()
    for name in ("SMoE", "MH-MoE h 2", "MH-MoE h 3", "fine-grained"):
        # Rounding of widths, routers, and combining make the difference at such small sizes; not matched, MH-MoE is at
        # 1.19 of SMoE.
        assert products[name] == pytest.approx(products["dense"], rel=0.25), name
        assert products[name] == pytest.approx(products["SMoE"], rel=0.08), name


def test_each_kernel_that_can_run_computes_each_layer_and_the_others_say_why_not():
    layers, absent = our_layers(SMALL, [2], False, ["reference", "grouped", "megablocks"], CPU)
    of_kernel = {layer.name: layer.moe.kernel for layer in layers if layer.moe}
    assert of_kernel["SMoE, reference"] == "reference"
    assert of_kernel["MH-MoE h 2, grouped"] == "grouped"
    assert len(of_kernel) == 2 * 4
    [missing] = absent
    assert missing.name == "kernel megablocks"
    assert "needs CUDA" in missing.why
    outputs = {layer.name: Case(layer, SMALL, "float32", CPU).run() for layer in layers}
    torch.testing.assert_close(outputs["SMoE, reference"], outputs["SMoE, grouped"])


@pytest.mark.parametrize(
    ("heads", "kernels", "why"),
    [
        ([5], ["auto"], "does not split"),
        ([0], ["auto"], "does not split"),
        ([2], ["quick"], "none of that name"),
        ([2], ["capacity"], "--static"),
        ([2], ["megablocks"], "needs CUDA"),
    ],
)
def test_what_cannot_be_is_refused(heads, kernels, why):
    with pytest.raises(SpecError, match=why):
        our_layers(SMALL, heads, False, kernels, CPU)


@pytest.mark.cpu
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_precision_that_a_kernel_never_computes_is_named_before_the_machine(device):
    with pytest.raises(SpecError, match="kernel cpp computes in bfloat16, not in float32"):
        our_layers(SMALL, [2], False, ["cpp"], torch.device(device), "float32")
