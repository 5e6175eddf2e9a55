import pytest
import torch

from mhmoe_ray.bench import timing
from mhmoe_ray.bench.layers import Layer, LayerShape, has_masks
from mhmoe_ray.bench.measure import STATIC_ROWS, LayerRequest, as_json, failure_reason, measure, requested_layers
from mhmoe_ray.errors import SpecError

SMALL = LayerShape(tokens=16, d_model=48, experts=4, top_k=2, d_expert=96)
CPU = torch.device("cpu")


def test_each_layer_has_rounds_and_memory():
    lines = []
    measurements = measure(
        LayerRequest(SMALL, [2], "float32", 3, static=True), timing.find_hardware("cpu"), lines.append
    )
    assert lines == ["7 layers, 3 rounds"]
    assert not measurements.skipped
    rows = as_json(measurements.figures)
    assert [row["layer"] for row in rows][:2] == ["dense", "SMoE"]
    assert rows[0]["to_dense"] == rows[1]["to_smoe"] == 1
    for figures in measurements.figures:
        assert len(figures.seconds) == 3
        assert 0 < figures.saved_bytes < figures.peak_bytes
        assert min(figures.seconds) <= figures.median <= max(figures.seconds)


def test_static_routing_with_large_masks_is_skipped():
    tokens = STATIC_ROWS // 2 + 1
    request = LayerRequest(SMALL._replace(tokens=tokens), [2], "float32", 1, static=True)
    layers, skipped = requested_layers(request, CPU)
    assert [layer.name for layer in layers if has_masks(layer.moe)] == ["SMoE static"]
    [skipped_case] = skipped
    assert skipped_case.name == "MH-MoE h 2 static"
    assert skipped_case.reason.startswith(f"{2 * tokens:,} rows: its masks grow with the square")


def test_named_kernel_that_refuses_sizes_is_skipped():
    wide_shape = LayerShape(tokens=4, d_model=1040, experts=2, top_k=1, d_expert=16)
    request = LayerRequest(wide_shape, [], "float32", 1, kernels=["grouped", "triton"])
    if torch.cuda.is_available():
        pytest.skip("on a GPU the sizes differ")
    measurements = measure(request, timing.find_hardware("cpu"), lambda line: None)
    assert [f.name for f in measurements.figures] == [
        "dense",
        *(f"{n}, grouped" for n in ("SMoE", "X-MoE", "fine-grained")),
    ]
    assert [a.name for a in measurements.skipped] == [f"{n}, triton" for n in ("SMoE", "X-MoE", "fine-grained")]
    assert {a.reason for a in measurements.skipped} == {
        "moe.kernel triton takes rows up to 1024 wide, not 1040: set it to auto"
    }
    with pytest.raises(SpecError, match="triton takes rows up to 1024 wide"):
        measure(request._replace(kernels=["triton"]), timing.find_hardware("cpu"), lambda line: None)


def test_error_is_a_reason_unless_it_is_a_bug():
    moe = SMALL.plain_moe
    layers = {
        "peer": Layer("peer", moe, torch.nn.Identity, "package 1.0"),
        "ours": Layer("ours", moe, torch.nn.Identity),
        "named": Layer("named", moe.model_copy(update={"kernel": "triton"}), torch.nn.Identity),
    }
    assert failure_reason(layers["peer"], RuntimeError("no\nmore")) == "RuntimeError: no"
    assert failure_reason(layers["ours"], ValueError("no")) is None
    assert failure_reason(layers["named"], ValueError("too wide\nmore")) == "too wide"
    assert failure_reason(layers["named"], RuntimeError("no")) is None
    assert (
        failure_reason(layers["ours"], torch.OutOfMemoryError("CUDA out of memory. Tried"))
        == "CUDA out of memory. Tried"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_measures_all_kernels():
    request = LayerRequest(SMALL, [2], "bfloat16", 2, kernels=["grouped", "triton", "megablocks"], static=True)
    measurements = measure(request, timing.find_hardware("cuda"), lambda line: None)
    assert {f.name for f in measurements.figures} > {"dense", "SMoE, grouped", "MH-MoE h 2, triton", "SMoE static"}
    assert all(0 < f.saved_bytes < f.peak_bytes for f in measurements.figures)
