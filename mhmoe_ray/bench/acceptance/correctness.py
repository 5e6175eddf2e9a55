"""Checks of each expert kernel against float64: outputs, gradients, and bit-identical results of a second run.

Special cases have no rows, or one expert that gets nearly all rows.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mhmoe_kernels import BACKENDS, ExpertWeights, Function, GeluSubln, Swiglu, run_experts, unavailable_reason
from mhmoe_kernels.choice import ExpertSizes
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings, first_line

KERNELS = ("grouped_gemm", "grouped_mm", "triton", "grouped", "megablocks")
FUNCTIONS: dict[str, Function] = {"swiglu": Swiglu(), "gelu_subln": GeluSubln()}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest error that passes, relative to the norm of the float64 result."""
_SHAPES = ((1000, 192, 768, 8, 2), (2000, 384, 1000, 40, 4), (2000, 96, 384, 128, 8), (1000, 2048, 512, 16, 4))
_TOY_SHAPES = ((8, 16, 24, 3, 2),)
_SANITIZER_SHAPES = ((600, 128, 200, 5, 2), (300, 96, 64, 5, 2))
"""Sizes for `sanitizer_cases`: rows, width of a row, hidden width of an expert, experts, and experts per row."""


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each kernel, dtype, expert function and shape: its largest errors, and whether it `passed`."""
    return _cases(settings, _TOY_SHAPES if settings.is_toy else _SHAPES, 20 if settings.is_toy else 4000)


def sanitizer_cases(settings: Settings) -> Iterator[PartCase]:
    """Yield the cases for compute-sanitizer: a few shapes that reach all branches of the kernels."""
    return _cases(settings, _SANITIZER_SHAPES, 400)


def _cases(settings: Settings, shapes: tuple[tuple[int, ...], ...], hot_rows: int) -> Iterator[PartCase]:
    for kernel in KERNELS:
        for dtype in (torch.float32, torch.bfloat16):
            # Fused kernels take long to compile, and they are not meant for float32.
            few_shapes = kernel == "triton" and dtype == torch.float32
            problems: list[tuple[str, Function, tuple[int, ...], bool]] = []
            for shape in shapes[:1] if few_shapes else shapes:
                title = "rows {} x {}, hidden {}, E {}, k {}".format(*shape)
                problems += [(f"{name}, {title}", function, shape, False) for name, function in FUNCTIONS.items()]
            problems.append(("no rows", Swiglu(), (0, 16, 16, 8, 1), False))
            problems.append(("hot", Swiglu(), (hot_rows, 16, 16, 8, 1), True))
            for title, function, shape, is_hot in problems:
                name = f"{kernel}, {dtype}, {title}"
                check = partial(_check, name, settings.torch_device, kernel, dtype, function, shape, is_hot)
                yield PartCase(name, check)


def _check(
    name: str,
    device: torch.device,
    kernel: str,
    dtype: torch.dtype,
    function: Function,
    shape: tuple[int, ...],
    is_hot: bool,
) -> Rows:
    _, width, hidden, experts, _ = shape
    sizes = ExpertSizes(function.name, str(dtype).removeprefix("torch."), width, hidden, experts)
    if reason := unavailable_reason(kernel, device, sizes):
        # Kernel `grouped_gemm` must run on every GPU, so it fails if it is unavailable. Other kernels are only skipped.
        yield {"name": name, "skipped": reason, **({"passed": False} if kernel == "grouped_gemm" else {})}
        return
    try:
        errors = compare(kernel, make_problem(function, dtype, shape, device, is_hot), TOLERANCES[dtype])
        yield {"name": name, **errors}
    # One kernel that fails must not hide the results of the others.
    except Exception as error:
        if device.type == "cuda":
            # After an illegal access to memory, every CUDA call fails. This call then raises an error, which ends this
            # part of the test.
            torch.cuda.synchronize()
        yield {"name": name, "passed": False, "error": first_line(error)}


Problem = tuple[Tensor, Tensor, Tensor, ExpertWeights]
"""Input of a kernel: the rows, the experts and the gates of each row, and the experts' weights."""


def make_problem(
    function: Function, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, is_hot: bool = False
) -> Problem:
    """Return random input of a kernel, in which some gates are 0, as those of dropped routes are.

    With `is_hot`, nearly all rows go to one expert, and some experts get none.
    """
    rows, width, hidden, experts, top_k = shape
    generator = torch.Generator().manual_seed(rows + width)
    draw = partial(torch.randn, generator=generator)
    if isinstance(function, Swiglu):
        gate_and_up = [draw(experts, hidden, width) * width**-0.5 for _ in range(2)]
        stacked = [*gate_and_up, draw(experts, width, hidden) * hidden**-0.5]
    else:
        stacked = [draw(experts, hidden, width) * width**-0.5, draw(experts, hidden) * 0.5]
        stacked += [1 + 0.3 * draw(experts, hidden), 0.3 * draw(experts, hidden)]
        stacked += [draw(experts, width, hidden) * hidden**-0.5, 0.3 * draw(experts, width)]
    expert_NK = torch.rand(rows, experts, generator=generator).topk(top_k, dim=-1).indices
    if is_hot:
        expert_NK = torch.where(torch.rand(rows, 1, generator=generator) < 0.95, 1, expert_NK % 4)
    gate_NK = (torch.rand(rows, top_k, generator=generator) - 0.2).relu()
    x_ND, *weights = (t.to(dtype).to(device) for t in (draw(rows, width), *stacked))
    return x_ND, expert_NK.to(device), gate_NK.to(device), ExpertWeights(function, tuple(weights))


def compare(kernel: str, problem: Problem, tolerance: float) -> dict[str, object]:
    """Return a kernel's errors beside the float64 reference: the largest relative one, and that of the worst row.

    The result also tells whether a second run was bit-identical, and whether the kernel passed.
    """
    results = _results(kernel, *problem)
    x_ND, expert_NK, gate_NK, weights = problem
    wide_weights = weights._replace(stacked=tuple(w.double() for w in weights.stacked))
    expected = _results("reference", x_ND.double(), expert_NK, gate_NK.double(), wide_weights)
    errors = [(a.double() - b).norm() / b.norm().clamp(min=1e-12) for a, b in zip(results, expected, strict=True)]
    # If one of the errors is NaN, torch's `max` returns NaN, which fails the check. Python's `max` could hide it.
    error = float(torch.stack(errors).max())
    row_error = _worst_row(results[0].double(), expected[0])
    has_equal_bits = all(torch.equal(a, b) for a, b in zip(results, _results(kernel, *problem), strict=True))
    # torch's own kernels need not be bit-identical in a second run; ours must be.
    passed = error <= tolerance and row_error <= 10 * tolerance
    passed = passed and (has_equal_bits or kernel not in ("grouped_gemm", "triton"))
    return {"error": error, "row_error": row_error, "equal_bits": has_equal_bits, "passed": passed}


def _worst_row(y_ND: Tensor, expected_ND: Tensor) -> float:
    """Return the largest error of any row, divided by the mean norm of rows; a norm over all rows could hide it."""
    if not len(y_ND):
        return 0.0
    return float((y_ND - expected_ND).norm(dim=1).max() / expected_ND.norm(dim=1).mean().clamp(min=1e-12))


def _results(kernel: str, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> list[Tensor]:
    assert kernel in BACKENDS
    x, gate, *stacked = (t.detach().requires_grad_() for t in (x_ND, gate_NK, *weights.stacked))
    y_ND = run_experts(kernel, x, expert_NK, gate, weights._replace(stacked=tuple(stacked)))
    direction = torch.arange(y_ND.numel(), device=y_ND.device, dtype=torch.float64).sin().view_as(y_ND)
    gradients = torch.autograd.grad(
        (y_ND * direction.to(y_ND.dtype)).sum(), [x, gate, *stacked], materialize_grads=True
    )
    return [y_ND.detach(), *gradients]
