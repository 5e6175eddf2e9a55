import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_ray.bench.layers import Shape, layer_cases
from mhmoe_ray.errors import SpecError

SMALL = Shape(tokens=24, d_model=48, experts=4, top_k=2, d_expert=96)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_layers_run_both_ways_and_cost_the_same(dtype):
    cases = layer_cases(SMALL, [2, 3], dtype, static=True)
    assert [case.name for case in cases][:2] == ["dense", "SMoE"]
    products = {}
    for case in cases:
        with FlopCounterMode(display=False) as counter:
            y = case.run()
        assert y.shape == (1, 24, 48)
        assert torch.isfinite(y).all()
        products[case.name] = counter.get_total_flops()
        assert case.kept > 0
    for name in ("SMoE", "MH-MoE h 2", "MH-MoE h 3", "fine-grained"):
        # Rounding of widths, routers, and combining make the difference at such small sizes.
        assert products[name] == pytest.approx(products["dense"], rel=0.25), name
    kept = {case.name: case.kept for case in cases}
    assert kept["SMoE static"] > kept["SMoE"]


def test_more_heads_than_fit_are_refused():
    with pytest.raises(SpecError, match="does not split"):
        layer_cases(SMALL, [5], "float32", static=False)
