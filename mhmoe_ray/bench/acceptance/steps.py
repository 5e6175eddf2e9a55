"""Training steps on the device beside the same steps on the CPU in float32, for each kind of model."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhmoe_ray.bench.acceptance.ranks import process_group
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings
from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.distributed.dispatch.flat import FlatDispatch
from mhmoe_ray.model.held import is_dtensor
from mhmoe_ray.spec import ClusterSpec, DataSpec, ModelSpec, RunSpec, SourceSpec, TrainSpec

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
GROUP_VARIANTS: dict[str, dict[str, Any]] = {
    "ddp of one rank": {"strategy": "ddp"},
    "fsdp of one rank": {"strategy": "fsdp", "shard_experts": True},
    "flat dispatch of one rank": {"strategy": "fsdp"},
}
"""Changes to the section `cluster` of further variants, which are trained in a process group of one rank.

A rank sends no rows to itself, so with flat dispatch only the sort and the copies of rows are checked."""
# In bfloat16 some rows (sub-tokens) choose other experts than in float32, which changes the gradients of these experts,
# so the tolerances are large.
_GRADIENT_TOLERANCE, _LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}, {"float32": 1e-3, "bfloat16": 5e-2}


def make_spec(variant: str, precision: str, is_toy: bool) -> RunSpec:
    """Return the spec that trains a small model of a variant in `VARIANTS` or `GROUP_VARIANTS`."""
    model, moe, train = VARIANTS.get(variant, ({}, {}, {}))
    width, layers = (32, 1) if is_toy else (128, 2)
    sections = {"vocab_size": 256, "d_model": width, "layers": layers, "attention_heads": 4, **model}
    data = DataSpec(sources={"none": SourceSpec(path="none")}, prepared="none", seq_len=16 if is_toy else 128)
    return RunSpec(
        name="acceptance",
        model=ModelSpec.model_validate({**sections, "moe": {**_MOE, **moe}}),
        data=data,
        cluster=ClusterSpec.model_validate(GROUP_VARIANTS.get(variant, {})),
        train=TrainSpec.model_validate(
            {"steps": 20, "micro_batches": 1, "micro_batch_size": 4, "precision": precision, "warmup_steps": 5, **train}
        ),
    )


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each variant: the largest error of a gradient in the first step, and of a loss in any step."""
    for variant in (*VARIANTS, *GROUP_VARIANTS):
        for precision in ("float32", "bfloat16"):
            yield PartCase(f"{variant}, {precision}", partial(_compare, settings, variant, precision))


def _compare(settings: Settings, variant: str, precision: str) -> Rows:
    steps = 2 if settings.is_toy or settings.is_compiling else 20
    spec = make_spec(variant, "float32", settings.is_toy)
    reference_spec = spec.model_copy(update={"train": spec.train.model_copy(update={"compile": False})})
    expected_gradients, expected_losses = _train(StepCase(reference_spec, torch.device("cpu")), steps)
    with ExitStack() as contexts:
        if variant in GROUP_VARIANTS:
            folder = Path(contexts.enter_context(tempfile.TemporaryDirectory()))
            contexts.enter_context(process_group(settings.device, folder))
        case = StepCase(make_spec(variant, precision, settings.is_toy), settings.torch_device)
        if variant.startswith("flat dispatch"):
            for layer in case.trainer.model.moe_layers():
                layer.dispatch = FlatDispatch(case.trainer.mesh.group("ep"))
        gradients, losses = _train(case, steps)
    gradient_errors, loss_errors = [0.0], [0.0]
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        if gradient is None or expected is None:
            assert gradient is expected
            continue
        gradient_errors.append(float((gradient - expected).norm() / expected.norm().clamp(1e-9)))
    loss_errors += [abs(loss / expected - 1) for loss, expected in zip(losses, expected_losses, strict=True)]
    # If one of the errors is NaN, torch's `max` returns NaN, which fails the check. Python's `max` could hide it.
    gradient_error, loss_error = (float(torch.tensor(errors).max()) for errors in (gradient_errors, loss_errors))
    passed = gradient_error <= _GRADIENT_TOLERANCE[precision] and loss_error <= _LOSS_TOLERANCE[precision]
    errors = {"gradient_error": gradient_error, "loss_error": loss_error}
    yield {"name": f"{variant}, {precision}", **errors, "steps": steps, "passed": passed}


def _train(case: StepCase, steps: int) -> tuple[list[Tensor | None], list[float]]:
    """Return the gradients of the first step, in float64 on the CPU, and the loss of each step."""
    gradients: list[Tensor | None] = []
    losses = []
    for step in range(steps):
        sums = case.trainer.accumulate(case.batches)
        if step == 0:
            for parameter in case.trainer.model.parameters():
                gradient: Any = parameter.grad
                if is_dtensor(gradient):
                    gradient = gradient.full_tensor()
                gradients.append(None if gradient is None else gradient.cpu().double())
        losses.append(sums.loss)
        case.trainer.update(sums)
    return gradients, losses
