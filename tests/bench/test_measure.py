import pytest
import torch

from mhmoe_ray.bench import timing
from mhmoe_ray.bench.layers import Layer, Shape, has_masks
from mhmoe_ray.bench.measure import STATIC_ROWS, Request, as_json, cannot, measure, wanted
from mhmoe_ray.errors import SpecError

SMALL = Shape(tokens=16, d_model=48, experts=4, top_k=2, d_expert=96)
CPU = torch.device("cpu")


def test_every_layer_has_its_rounds_and_its_memory():
    said = []
    found = measure(Request(SMALL, [2], "float32", 3, static=True), timing.find("cpu"), said.append)
    assert said == ["7 layers, 3 rounds"]
    assert not found.absent
    rows = as_json(found.figures)
    assert [row["layer"] for row in rows][:2] == ["dense", "SMoE"]
    assert rows[0]["to_dense"] == rows[1]["to_smoe"] == 1
    for figures in found.figures:
        assert len(figures.seconds) == 3
        assert 0 < figures.kept < figures.peak
        assert min(figures.seconds) <= figures.median <= max(figures.seconds)


def test_static_routing_is_left_out_where_its_masks_are_too_large():
    tokens = STATIC_ROWS // 2 + 1
    request = Request(SMALL._replace(tokens=tokens), [2], "float32", 1, static=True)
    layers, absent = wanted(request, CPU)
    assert [layer.name for layer in layers if has_masks(layer.moe)] == ["SMoE static"]
    [missing] = absent
    assert missing.name == "MH-MoE h 2 static"
    assert missing.why.startswith(f"{2 * tokens:,} rows: its masks grow with the square")


def test_a_named_kernel_that_refuses_these_sizes_is_listed():
    wide = Shape(tokens=4, d_model=1040, experts=2, top_k=1, d_expert=16)
    request = Request(wide, [], "float32", 1, kernels=["grouped", "triton"])
    if torch.cuda.is_available():
        pytest.skip("on a GPU the sizes differ")
    found = measure(request, timing.find("cpu"), lambda line: None)
    assert [f.name for f in found.figures] == ["dense", *(f"{n}, grouped" for n in ("SMoE", "X-MoE", "fine-grained"))]
    assert [a.name for a in found.absent] == [f"{n}, triton" for n in ("SMoE", "X-MoE", "fine-grained")]
    assert {a.why for a in found.absent} == {
        "moe.kernel triton takes rows up to 1024 wide, not 1040: set it to grouped"
    }
    with pytest.raises(SpecError, match="triton takes rows up to 1024 wide"):
        measure(request._replace(kernels=["triton"]), timing.find("cpu"), lambda line: None)


def test_an_error_is_a_reason_only_where_it_is_not_a_bug_of_ours():
    moe = SMALL.plain
    of = {
        "peer": Layer("peer", moe, torch.nn.Identity, "package 1.0"),
        "ours": Layer("ours", moe, torch.nn.Identity),
        "named": Layer("named", moe.model_copy(update={"kernel": "triton"}), torch.nn.Identity),
    }
    assert cannot(of["peer"], RuntimeError("no\nmore")) == "RuntimeError: no"
    assert cannot(of["ours"], ValueError("no")) is None
    assert cannot(of["named"], ValueError("too wide\nmore")) == "too wide"
    assert cannot(of["named"], RuntimeError("no")) is None
    assert cannot(of["ours"], torch.OutOfMemoryError("CUDA out of memory. Tried")) == "CUDA out of memory. Tried"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_card():
    request = Request(SMALL, [2], "bfloat16", 2, kernels=["grouped", "triton", "megablocks"], static=True)
    found = measure(request, timing.find("cuda"), lambda line: None)
    assert {f.name for f in found.figures} > {"dense", "SMoE, grouped", "MH-MoE h 2, triton", "SMoE static"}
    assert all(0 < f.kept < f.peak for f in found.figures)
