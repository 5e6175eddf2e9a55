"""Tests of the fused update of weights with moments in bfloat16 against the update in pieces on a CPU."""

import importlib.util
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from mhmoe_kernels.triton import can_run
from mhmoe_ray.bench.acceptance.accounting import Accounting
from mhmoe_ray.distributed.rounded_adamw import MOMENT_NAMES, RoundedAdamW, ValuePosition
from tests.kernels.triton.problems import DEVICE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    # The tests also run without a GPU, in Triton's interpreter.
    pytest.mark.gpu,
]
CPU = torch.device("cpu")
OPTIONS = {"lr": 1e-3, "eps": 1e-8, "fused": True}


def update(device, weight, gradients, offset, **options):
    """Return the weights and both moments after one update with each of the gradients."""
    parameter = torch.nn.Parameter(weight.to(device, copy=True))
    optimizer = RoundedAdamW([{"params": [parameter]}], {parameter: ValuePosition("w", offset)}, 7, **options)
    for gradient in gradients:
        parameter.grad = gradient.to(device)
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["step"] == len(gradients)
    return [parameter.detach().cpu(), *(state[name].cpu() for name in MOMENT_NAMES)]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch fuses no additions on this CPU"
)
@pytest.mark.parametrize("values", [1, 1000, 4099])
@pytest.mark.parametrize("offset", [0, (1 << 31) - 100, (1 << 33) + 7])
@pytest.mark.parametrize(("betas", "weight_decay"), [((0.9, 0.95), 0.1), ((0.4, 0.6), 0.0)])
def test_update_equals_that_on_a_cpu_to_the_bit(monkeypatch, values, offset, betas, weight_decay):
    """Gradients have magnitudes from 1e-6 to 1, and some are 0. Positions exceed 32 bits."""
    if DEVICE.type == "cpu" and Version(version("triton")) < Version("3.9"):
        pytest.skip("the interpreter of this Triton rounds a fused product and sum twice")
    generator = torch.Generator().manual_seed(values)
    weight, *gradients = torch.randn(5, values, generator=generator)
    gradients = [g * 10 ** (-6 * torch.rand(values, generator=generator)) for g in gradients]
    gradients[0][::3] = 0
    options = {**OPTIONS, "betas": betas, "weight_decay": weight_decay}
    assert can_run(weight.to(DEVICE))
    results = update(DEVICE, weight, gradients, offset, **options)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not can_run(weight)
    expected = update(CPU, weight, gradients, offset, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_update_is_one_kernel_and_moves_each_value_once():
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(3, 1 << 20))
        parameter.grad = torch.empty_like(parameter)
        optimizer = RoundedAdamW([{"params": [parameter]}], {parameter: ValuePosition("w", 0)}, 7, **OPTIONS)
        # A fake tensor has no value that could be the number of updates.
        moments = {name: torch.empty_like(parameter, dtype=torch.bfloat16) for name in MOMENT_NAMES}
        optimizer.state[parameter] = {"step": 0, **moments}
        with Accounting() as accounting:
            optimizer.step()
    # torch marks each update for its profiler.
    marks = {"_record_function_enter_new", "_record_function_exit"}
    assert {name: n for name, n in accounting.kernels.items() if name not in marks} == {"rounded_adamw": 1}
    # The kernel reads the weight, the gradient and both moments, and writes all but the gradient.
    assert sum(accounting.bytes.values()) <= (12 + 8) * parameter.numel()


def test_update_launches_its_kernel_once(monkeypatch):
    from triton.runtime import interpreter

    launches = []
    call = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda *args, **kwargs: (launches.append(1), call(*args, **kwargs))[1]
    )
    update(CPU, torch.ones(2000), [torch.ones(2000)], 0, **OPTIONS)
    update(CPU, torch.ones(0), [torch.ones(0)], 0, **OPTIONS)
    assert len(launches) == 1
