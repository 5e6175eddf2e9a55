"""Tests of whole layers on the GPU path, without a GPU: fake tensors, numbers of kernels, bytes and memory."""

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mhmoe_kernels import BACKENDS, allow_compilation, plan_received
from mhmoe_kernels.choice import GPU_CHOICES
from mhmoe_ray.bench.acceptance.accounting import Accounting
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.model.router import route_counts
from mhmoe_ray.spec import ModelSpec
from tests.kernels.triton.accounting import saved_bytes
from tests.support.tensors import default_dtype

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.long,
]
# The layers have about the same numbers of multiply-adds and of parameters. A value is (h, E, k, f): numbers of heads,
# of experts and of choices, and the hidden width of an expert.
LAYERS = {"h 1": (1, 64, 8, 1024), "h 2": (2, 152, 8, 856), "h 4": (4, 296, 8, 856)}
WIDTH, TOKENS = 2048, 32768
SYNC_FREE = ["grouped_gemm", "grouped_mm", "triton"]


def make_spec(layer, kernel, **moe):
    heads, experts, top_k, width = LAYERS[layer]
    moe = {"heads": heads, "experts": experts, "top_k": top_k, "d_expert": width, "every": 1, "kernel": kernel, **moe}
    return ModelSpec(vocab_size=1, d_model=WIDTH, layers=1, attention_heads=1, moe=moe)


def build_small_layer(backbone, kernel, capacity_factor):
    """Return a layer with random weights that is small enough for Triton's interpreter."""
    moe = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 16, "every": 1}
    moe |= {"kernel": kernel, "capacity_factor": capacity_factor}
    module = MultiHeadMoE(ModelSpec(vocab_size=1, d_model=32, layers=1, attention_heads=1, backbone=backbone, moe=moe))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


def kernels_of(layer):
    """Return the kernels of `SYNC_FREE` that accept the rows of a layer; `triton` accepts rows of up to 1024 values."""
    return [kernel for kernel in SYNC_FREE if kernel != "triton" or layer != "h 1"]


CASES = [(layer, kernel) for layer in LAYERS for kernel in kernels_of(layer)]


def test_every_row_of_the_table_but_the_last_is_free_of_host_waits():
    *rows, last_row = GPU_CHOICES
    assert {row.kernel for row in rows} == set(SYNC_FREE)
    assert last_row.kernel == "grouped"
    assert all(row.evidence for row in GPU_CHOICES)
    assert all(row.kernel in BACKENDS for row in GPU_CHOICES)


@pytest.mark.parametrize(("layer", "kernel"), CASES)
@pytest.mark.parametrize("static", [False, True], ids=["dropless", "static"])
def test_layer_needs_no_value_on_the_host_and_few_kernels(layer, kernel, static):
    """Fake tensors have no values, so a layer that asked for one would fail. Kernels are counted from the tokens to the
    gradients of all parameters, with both losses of the router."""
    spec = make_spec(layer, kernel, **({"capacity_factor": 1.25} if static else {}))
    with FakeTensorMode():
        module = MultiHeadMoE(spec)
        x_BTM = torch.empty(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        with Accounting() as accounting:
            with torch.autocast("cpu", torch.bfloat16):
                y_BTM, routing = module(x_BTM)
            outputs = (y_BTM, routing.balance_loss, routing.z_loss)
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.backward(outputs, gradients)
    assert all(p.grad is not None for p in module.parameters())
    assert sum(accounting.kernels.values()) <= 64, accounting.kernels
    heads, _, top_k, _ = LAYERS[layer]
    routes, row_width = TOKENS * heads * top_k, WIDTH // heads
    wide = [s for s in accounting.shapes if s[2] == torch.float32 and s[1] == (routes, row_width)]
    assert wide == []


@pytest.mark.parametrize(("layer", "kernel"), CASES)
def test_inference_runs_on_fake_cuda_tensors(monkeypatch, layer, kernel):
    # A CPU build of torch cannot fill fake tensors of this device with random numbers.
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
    with FakeTensorMode(), torch.no_grad():
        # A CPU build of torch can create fake tensors of this device, but not move them there.
        with torch.device("cuda"), default_dtype(torch.bfloat16):
            module = MultiHeadMoE(make_spec(layer, kernel)).eval()
        y_BTM, routing = module(torch.empty(1, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda"))
    assert (y_BTM.device.type, y_BTM.shape) == ("cuda", (1, TOKENS, WIDTH))
    assert routing.count_E.device.type == "cuda"


@pytest.mark.parametrize("layer", LAYERS)
def test_grouped_products_move_few_bytes_and_keep_little(layer):
    """The bound on moved bytes is 1.3 times those of writing each tensor once and reading it once for each consumer.

    The tensors are x, rows, gate and up, hidden values, outputs, y and weights, and the gradients of all of them.
    """
    heads, experts, top_k, hidden = LAYERS[layer]
    rows, width = TOKENS * heads, WIDTH // heads
    routes = rows * top_k
    with FakeTensorMode():
        module = MultiHeadMoE(make_spec(layer, "grouped_gemm", recompute=0.0)).experts
        weights = [w.detach().bfloat16().requires_grad_() for w in module.parameters()]
        x_ND = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        expert_NK = torch.empty(rows, top_k, dtype=torch.int64)
        gate_NK = torch.empty(rows, top_k, requires_grad=True)
        run = BACKENDS["grouped_gemm"].run
        stacked = module.cast_rows(x_ND)[1]._replace(stacked=tuple(weights))
        with Accounting() as accounting:
            y_ND, kept_bytes = saved_bytes(lambda: run(x_ND, expert_NK, gate_NK, stacked))
            y_ND.backward(torch.empty_like(y_ND))
    x, row, values = rows * width, routes * width, routes * hidden
    matrices = 3 * experts * width * hidden
    forward = x + row + 2 * row + 2 * values + 2 * values + values + values + row + row + x + matrices
    backward = (
        (x + row)  # dy becomes the gradient of each route's output
        + (row + values)  # gradient of the hidden values
        + (3 * values + 3 * values)  # gate, up and that gradient become their gradients and the scaled hidden values
        + (row + values) + 2 * (values + row) + matrices  # gradients of the three matrices
        + (2 * values + row) + (row + x)  # gradient of the rows, and of x
        + matrices  # each matrix is read for a gradient of its input
    )  # fmt: skip
    assert sum(accounting.bytes.values()) <= 1.3 * 2 * (forward + backward)
    expected_bytes = 2 * (row + 2 * values) + routes * (4 + 4 + 4)
    own_weights = sum(w.numel() * w.element_size() for w in weights)
    assert kept_bytes - own_weights <= 1.1 * expected_bytes


def test_operators_launch_what_they_state(monkeypatch):
    """Each launch passes through the interpreter, where the test counts it."""
    from triton.runtime import interpreter

    from mhmoe_kernels.operators import LAUNCHES

    counts = []
    call = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda *args, **kwargs: (counts.append(1), call(*args, **kwargs))[1]
    )

    class Launches(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            count_before = len(counts)
            results = function(*args, **(kwargs or {}))
            if function.namespace == "mhmoe":
                name = function._schema.name.split("::")[1]
                launches.setdefault(name, set()).add(len(counts) - count_before)
            return results

    launches = {}
    for backbone in ("llama", "subln"):
        for kernel in ("grouped_gemm", "triton"):
            for capacity_factor in (None, 1.0):
                module = build_small_layer(backbone, kernel, capacity_factor)
                with Launches():
                    y, routing = module(torch.randn(1, 8, 32, requires_grad=True))
                    (y.sum() + routing.balance_loss + routing.z_loss).backward()
                assert torch.equal(routing.count_E.sum() + routing.dropped_routes, torch.tensor(32))
                assert torch.equal(routing.count_E, route_counts(routing.expert_NK, 4, routing.gate_NK != 0))
    with Launches():
        assert plan_received(torch.tensor([[3, 1], [0, 2]]), 6).slot_NK.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    # `schedule_tiles` is called only inside other operators here. `torch_linear` and `torch_outer` belong to kernel
    # `grouped_mm`, and `rounded_adamw` to the optimizer, which are not tested here.
    assert launches.keys() == LAUNCHES.keys() - {"schedule_tiles", "torch_linear", "torch_outer", "rounded_adamw"}
    for name, launch_counts in launches.items():
        # A number in `LAUNCHES` may be larger, because it includes kernels of torch, which are not interpreted.
        assert max(launch_counts) <= LAUNCHES[name], (name, launch_counts)
        assert max(launch_counts) >= 1, name


@pytest.mark.filterwarnings("default")  # tracing gives rise to warnings inside torch
@pytest.mark.parametrize(
    ("backbone", "kernel", "capacity_factor"),
    [
        ("llama", "grouped_gemm", None),
        ("subln", "grouped_gemm", 1.0),
        ("llama", "triton", 1.0),
        ("subln", "triton", None),
    ],
)
def test_compiled_layer_is_one_graph_with_the_same_results(backbone, kernel, capacity_factor):
    module = build_small_layer(backbone, kernel, capacity_factor)
    x_BTM = torch.randn(1, 8, 32, requires_grad=True)

    def run():
        y_BTM, routing = module(x_BTM)
        outputs = [y_BTM, routing.balance_loss, routing.z_loss]
        return outputs, torch.autograd.grad(sum(t.sum() for t in outputs), [x_BTM, *module.parameters()])

    expected = run()
    torch._dynamo.reset()
    allow_compilation()
    module.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)
