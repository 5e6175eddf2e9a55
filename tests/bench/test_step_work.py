"""Tests of the count of a training step's work: compiled code, FLOPs, parts, and specs that cannot be counted."""

import importlib.util
from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mhmoe_ray.bench.acceptance.accounting import Work
from mhmoe_ray.bench.acceptance.step_work import count_step
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.adapt import with_keys
from mhmoe_ray.planner.sizes import compute_sizes, flops_per_token
from tests.support.encoders import encoder_spec
from tests.support.specs import tiny_spec

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("default"),  # the import of torch's compiler warns
]


def gpu_spec(**train):
    model = {"d_model": 64, "moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 32}}
    train = {"precision": "bfloat16", "micro_batches": 1, **train}
    return tiny_spec(model={**tiny_spec().model.model_dump(), **model}, cluster={"gpus_per_worker": 1}, train=train)


@pytest.fixture(autouse=True, scope="module")
def clear_caches_of_fake_gpu():
    """Clear what torch keeps of graphs on a fake GPU, which the next compiled model on the CPU would take."""
    yield
    torch._dynamo.reset()
    FakeTensorMode.cache_clear()
    for operator in (torch.ops.aten.rms_norm.default, torch.ops.aten._fused_rms_norm.default):
        operator._dispatch_cache.clear()


def total(parts):
    return sum(parts.values(), Work())


def count_compiled(function, *shapes):
    from mhmoe_ray.bench.acceptance.compiled import counting_backend

    torch._dynamo.reset()
    parts = defaultdict(Work)
    with FakeTensorMode() as fake_mode:
        tensors = [torch.empty(shape) for shape in shapes]
        torch.compile(function, backend=counting_backend(parts, fake_mode))(*tensors)
    return parts


def test_fused_operations_are_one_kernel_that_reads_and_writes_once():
    parts = count_compiled(lambda x: (2 * x + 1).relu() * 3, (1024, 1024))
    work = total(parts)
    assert (work.kernels, work.bytes, work.flops) == (1, 2 * 4 * 1024**2, 0)


def test_a_product_of_compiled_code_has_its_flops_and_a_kernel_of_its_own():
    parts = count_compiled(lambda x, w: (x @ w).relu(), (256, 64), (64, 128))
    products = parts["blocks: products"]
    assert (products.kernels, products.flops) == (1, 2 * 256 * 64 * 128)
    assert products.bytes == 4 * (256 * 64 + 64 * 128 + 256 * 128)
    assert total(parts).kernels == 2


def test_compiled_blocks_have_equal_flops_with_fewer_kernels_and_bytes():
    eager, compiled = (total(count_step(gpu_spec(compile=flag))) for flag in (False, True))
    assert compiled.flops == eager.flops
    assert compiled.kernels < eager.kernels
    assert compiled.bytes < eager.bytes


@pytest.mark.parametrize("compiled", [False, True])
def test_flops_are_those_of_the_planner(compiled):
    spec = gpu_spec(compile=compiled)
    tokens = spec.tokens_per_step
    planned_flops = flops_per_token(spec.model, spec.attention_length).training * tokens
    # The backward of attention computes the scores again, so it has 5 products where the planner counts 4.
    scores = planned_flops - 6 * compute_sizes(spec.model).macs_per_token * tokens
    assert total(count_step(spec)).flops == pytest.approx(planned_flops + scores / 6, rel=0.01)


@pytest.mark.parametrize("chunk_rows", [None, 8])
def test_each_micro_batch_has_equal_work_and_the_update_comes_once(chunk_rows):
    work_1, work_2, work_5 = (count_step(gpu_spec(micro_batches=m, loss_chunk_rows=chunk_rows)) for m in (1, 2, 5))
    assert total(work_5).kernels == total(work_1).kernels + 4 * (total(work_2).kernels - total(work_1).kernels)
    assert total(work_5).flops == pytest.approx(5 * total(work_1).flops)
    assert work_5["update"] == work_1["update"]


def test_recomputed_blocks_run_their_forward_again():
    plain, recomputed = (count_step(gpu_spec(recompute=mode)) for mode in ("none", "block"))
    assert recomputed["blocks: attention"].flops > 1.2 * plain["blocks: attention"].flops
    assert recomputed["output and loss"].flops == plain["output and loss"].flops


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (tiny_spec(cluster={"workers": 2, "ep": 2, "gpus_per_worker": 1}), "cluster.ep is 2"),
        (encoder_spec(cluster__gpus_per_worker=1), "only decoders"),
        (with_keys(gpu_spec(), {"model.moe.kernel": "grouped"}), "kernel grouped needs values"),
    ],
)
def test_specs_that_cannot_be_counted_are_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        count_step(spec)
