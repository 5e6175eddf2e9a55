"""Tests of the planned numbers of kernel launches, against the kernels that models dispatch on fake tensors."""

import importlib.util

import pytest

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.bench.acceptance.step_work import count_step
from mhmoe_ray.planner.adapt import with_keys
from mhmoe_ray.planner.estimate import LAUNCHES, estimate_step_time
from mhmoe_ray.planner.kernels import DISPATCH, launches_per_micro_batch
from mhmoe_ray.planner.placement import single_node_layout
from tests.support.encoders import encoder_spec
from tests.support.specs import tiny_spec
from tests.support.visions import vision_spec

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
TRUNK = {"vocab_size": 512, "d_model": 256, "layers": 4, "attention_heads": 4}


def spec_of(moe, backbone="llama", ep=1, **train):
    cluster = {"gpus_per_worker": 1, "workers": ep, "ep": ep}
    has_dense_layers = moe.get("every", 2) > 1
    return tiny_spec(
        model={**TRUNK, "backbone": backbone, "d_ff": 512 if has_dense_layers else None, "moe": moe},
        cluster=cluster,
        train={"precision": "bfloat16", **train},
    )


@pytest.mark.parametrize(
    ("backbone", "kernel"),
    [(name, kernel) for name in ARCHITECTURES for kernel in ARCHITECTURES[name].mixture_launches],
)
@pytest.mark.parametrize(("heads", "spacing", "chunk_rows"), [(1, 1, None), (1, 2, 8), (2, 1, None)])
def test_planned_launches_are_those_of_a_model(backbone, kernel, heads, spacing, chunk_rows):
    moe = {"heads": heads, "experts": 8, "top_k": 2, "d_expert": 256, "kernel": kernel, "every": spacing}
    spec = spec_of(moe, backbone, loss_chunk_rows=chunk_rows)
    kernels_1, kernels_2 = (
        sum(work.kernels for work in count_step(with_keys(spec, {"train.micro_batches": count})).values())
        for count in (1, 2)
    )
    assert launches_per_micro_batch(spec) == pytest.approx(kernels_2 - kernels_1, rel=0.03)


@pytest.mark.filterwarnings("default")  # the import of torch's compiler warns
@pytest.mark.parametrize(("heads", "spacing"), [(1, 2), (2, 1)])
def test_planned_launches_of_compiled_blocks_are_near_those_counted(heads, spacing):
    moe = {"heads": heads, "experts": 8, "top_k": 2, "d_expert": 256, "kernel": "grouped_mm", "every": spacing}
    spec = with_keys(spec_of(moe, compile=True), {"model.layers": 2})
    kernels_1, kernels_2 = (
        sum(work.kernels for work in count_step(with_keys(spec, {"train.micro_batches": count})).values())
        for count in (1, 2)
    )
    assert launches_per_micro_batch(spec) == pytest.approx(kernels_2 - kernels_1, rel=0.1)


def test_a_step_of_small_micro_batches_is_bound_by_launches():
    moe = {"heads": 2, "experts": 8, "top_k": 2, "d_expert": 256}
    small, large = spec_of(moe, micro_batch_size=1), spec_of(moe, micro_batch_size=4096)
    estimates = [estimate_step_time(spec, single_node_layout(1, 1)) for spec in (small, large)]
    names = [[time.name for time in estimate.compute_times] for estimate in estimates]
    assert ["waiting for launches" in parts for parts in names] == [True, False]
    assert estimates[0].longest_part.bound == LAUNCHES
    launches = small.train.micro_batches * launches_per_micro_batch(small)
    update = estimates[0].compute_times[-1].seconds
    # With one rank, there is nothing but launches and the update.
    assert estimates[0].sequential_seconds == pytest.approx(launches * 4e-6 + update)
    assert "micro_batch_size" in estimates[0].longest_part.remedy


@pytest.mark.parametrize("spec_with", [encoder_spec, vision_spec])
def test_the_wait_of_encoders_and_vision_models_is_left_out(spec_with):
    spec = spec_with(cluster__gpus_per_worker=1, train__precision="bfloat16")
    estimate = estimate_step_time(spec, single_node_layout(1, 1))
    assert LAUNCHES not in {time.bound for time in estimate.compute_times}


def test_experts_that_run_one_after_another_launch_more_kernels():
    moe = {"heads": 1, "experts": 64, "top_k": 2, "d_expert": 256}
    loop, grouped = (spec_of({**moe, "kernel": kernel}) for kernel in ("grouped", "grouped_gemm"))
    assert launches_per_micro_batch(loop) > 5 * launches_per_micro_batch(grouped)
    assert launches_per_micro_batch(
        spec_of({**moe, "kernel": "grouped_gemm"}, recompute="block")
    ) > launches_per_micro_batch(grouped)


def test_distributed_experts_launch_more_kernels():
    """tests/distributed/test_one_pass.py compares the number with that of a layer on two ranks."""
    moe = {"heads": 2, "experts": 8, "top_k": 2, "d_expert": 256, "every": 1}
    local, distributed = (launches_per_micro_batch(spec_of(moe, ep=ep)) for ep in (1, 2))
    assert distributed - local == 4 * DISPATCH
