"""Training steps on the device beside the same steps on the CPU in float32, for each kind of model."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings
from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.spec import DataSpec, ModelSpec, RunSpec, SourceSpec, TrainSpec

_MOE = {"heads": 2, "experts": 8, "top_k": 2, "d_expert": 64, "every": 1}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"heads": 1}, {}),
    "multi-head": ({}, {}, {}),
    "static": ({}, {"capacity_factor": 1.0}, {}),
    "normalized gates": ({}, {"normalize_gates": True}, {}),
    "sigmoid": ({}, {"scoring": "sigmoid", "bias_rate": 0.01}, {}),
    "xmoe": ({}, {"router": "xmoe", "router_dim": 16}, {}),
    "torchscale": ({}, {"router": "xmoe_torchscale"}, {}),
    "shared expert": ({}, {"d_shared": 64}, {}),
    "sub-LN": ({"backbone": "subln"}, {}, {}),
    "grouped queries": ({"kv_heads": 2}, {}, {}),
    "document masks": ({"kv_heads": 2, "document_masks": True}, {}, {}),
    "recompute": ({}, {}, {"recompute": "block"}),
    "chunked loss": ({}, {}, {"loss_chunk_rows": 48}),
    "moments": ({}, {}, {"moment_precision": "bfloat16"}),
    "compile": ({}, {}, {"compile": True}),
}
"""Changes of each variant to the spec's sections `model`, `model.moe` and `train`, in this order."""
# In bfloat16 some rows (sub-tokens) choose other experts than in float32, which changes the gradients of these experts,
# so the tolerances are large.
_GRADIENT_TOLERANCE, _LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}, {"float32": 1e-3, "bfloat16": 5e-2}


def make_spec(variant: str, precision: str, is_toy: bool) -> RunSpec:
    """Return the spec that trains a small model of a variant in `VARIANTS`."""
    model, moe, train = VARIANTS[variant]
    width, layers = (32, 1) if is_toy else (128, 2)
    sections = {"vocab_size": 256, "d_model": width, "layers": layers, "attention_heads": 4, **model}
    data = DataSpec(sources={"none": SourceSpec(path="none")}, prepared="none", seq_len=16 if is_toy else 128)
    return RunSpec(
        name="acceptance",
        model=ModelSpec.model_validate({**sections, "moe": {**_MOE, **moe}}),
        data=data,
        train=TrainSpec.model_validate(
            {"steps": 20, "micro_batches": 1, "micro_batch_size": 4, "precision": precision, "warmup_steps": 5, **train}
        ),
    )


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each variant: the largest error of a gradient in the first step, and of a loss in any step."""
    for variant in ("plain", "multi-head") if settings.is_toy else VARIANTS:
        for precision in ("float32", "bfloat16"):
            yield PartCase(f"{variant}, {precision}", partial(_compare, settings, variant, precision))


def _compare(settings: Settings, variant: str, precision: str) -> Rows:
    steps = 2 if settings.is_toy else 20
    reference = StepCase(make_spec(variant, "float32", settings.is_toy), torch.device("cpu"))
    case = StepCase(make_spec(variant, precision, settings.is_toy), settings.torch_device)
    gradient_errors, loss_errors = [0.0], [0.0]
    for step in range(steps):
        expected_sums, sums = (c.trainer.accumulate(c.batches) for c in (reference, case))
        if step == 0:
            pairs = zip(case.trainer.model.parameters(), reference.trainer.model.parameters(), strict=True)
            for parameter, expected in pairs:
                if parameter.grad is None or expected.grad is None:
                    assert parameter.grad is expected.grad
                    continue
                difference = parameter.grad.cpu().double() - expected.grad.double()
                gradient_errors.append(float(difference.norm() / expected.grad.double().norm().clamp(1e-9)))
        loss_errors.append(abs(sums.loss - expected_sums.loss) / expected_sums.loss)
        for c, c_sums in ((reference, expected_sums), (case, sums)):
            c.trainer.update(c_sums)
    # If one of the errors is NaN, torch's `max` returns NaN, which fails the check. Python's `max` could hide it.
    gradient_error, loss_error = (float(torch.tensor(errors).max()) for errors in (gradient_errors, loss_errors))
    passed = gradient_error <= _GRADIENT_TOLERANCE[precision] and loss_error <= _LOSS_TOLERANCE[precision]
    errors = {"gradient_error": gradient_error, "loss_error": loss_error}
    yield {"name": f"{variant}, {precision}", **errors, "steps": steps, "passed": passed}
