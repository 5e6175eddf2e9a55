"""Time of expert kernels alone: decoding, prefill and training with each kind of experts, on narrow and on wide rows.

The results decide which family of kernels stays for which rows: fused experts (`triton`) or grouped products.
"""

from collections.abc import Iterator
from functools import partial

import torch

from mhmoe_kernels import Function, run_experts, unavailable_reason
from mhmoe_kernels.choice import ExpertSizes
from mhmoe_ray.bench.acceptance.correctness import FUNCTIONS, Problem, make_problem
from mhmoe_ray.bench.acceptance.layers import KERNELS
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings, first_line
from mhmoe_ray.bench.timing import device_clock, time_interleaved

_EXPERTS_BY_WIDTH = {64: 128, 96: 128, 128: 128, 192: 128, 256: 128, 2048: 32}
"""Numbers of experts by the width of a row. Rows of 2,048 are those of sub-LN models with one head."""
_VALUES_BY_PHASE = {"decode": 1 << 16, "prefill": 1 << 24, "training": 1 << 24}
"""Values of all rows: of 32 tokens, or of 8,192, with 2,048 values each."""


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each phase, expert function, width of rows and kernel that can run: its time and TFLOP/s."""
    for function in FUNCTIONS.values():
        for phase, values in _VALUES_BY_PHASE.items():
            shapes = [(values // width, width, 768, experts, 8) for width, experts in _EXPERTS_BY_WIDTH.items()]
            for shape in [(8, 16, 24, 3, 2)] if settings.is_toy else shapes:
                sizes = ExpertSizes(function.name, "bfloat16", *shape[1:4])
                for kernel in KERNELS:
                    if unavailable_reason(kernel, settings.torch_device, sizes) is None:
                        name = f"{phase}, {function.name}, D {shape[1]}, {kernel}"
                        yield PartCase(name, partial(_measure, settings, name, phase, function, shape, kernel))


def _measure(
    settings: Settings, name: str, phase: str, function: Function, shape: tuple[int, ...], kernel: str
) -> Rows:
    problem = make_problem(function, torch.bfloat16, shape, settings.torch_device)
    run = partial(_run, kernel, problem)
    try:
        with torch.set_grad_enabled(phase == "training"):
            seconds = time_interleaved({"": run}, settings.rounds, device_clock(settings.torch_device))[""].median
    # One kernel that fails must not hide the results of the others.
    except Exception as error:
        if settings.device == "cuda":
            torch.cuda.synchronize()
        yield {"name": name, "passed": False, "error": first_line(error)}
        return
    rows, width, hidden, _, top_k = shape
    products = (3 if function.name == "swiglu" else 2) * (3 if phase == "training" else 1)
    yield {"name": name, "ms": seconds * 1e3, "TFLOP/s": 2 * products * rows * top_k * width * hidden / seconds / 1e12}


def _run(kernel: str, problem: Problem) -> None:
    """Run experts forward and, if gradients are enabled, backward."""
    x_ND, expert_NK, gate_NK, weights = problem
    leaves = [x_ND, gate_NK, *weights.stacked]
    for leaf in leaves:
        leaf.requires_grad_(torch.is_grad_enabled())
    y_ND = run_experts(kernel, x_ND, expert_NK, gate_NK, weights)
    if torch.is_grad_enabled():
        torch.autograd.grad(y_ND, leaves, torch.ones_like(y_ND))
