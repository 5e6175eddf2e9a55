"""Whole training steps with each setting that may become a default on GPUs, and the update with moments in bfloat16."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings
from mhmoe_ray.bench.acceptance.training import compared_models, measure_steps
from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.bench.timing import device_clock, time_interleaved
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import RunSpec, TrainSpec

PLAIN = {"compile": False, "loss_chunk_rows": None, "recompute": "none"}
PLAIN |= {"residual_precision": "float32", "moment_precision": "float32"}
FAST: dict[str, Any] = {"compile": True, "loss_chunk_rows": 2048}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"compile": True},
    "chunked loss": {"loss_chunk_rows": 2048},
    "bfloat16 residual": {"residual_precision": "bfloat16"},
    "bfloat16 moments": {"moment_precision": "bfloat16"},
    "recomputed blocks": {"recompute": "block"},
    "compile and chunked loss": FAST,
    "compile, chunked loss and bfloat16 residual": {**FAST, "residual_precision": "bfloat16"},
}
"""Keys of the section `train` that differ from `PLAIN`, by the name of the setting."""
UPDATE_BYTES = {"plain": 28, "bfloat16 moments": 20}
"""Bytes per value that an update must move: it reads the gradient, and reads and writes the weight and both moments."""


def step_specs(settings: Settings) -> dict[str, RunSpec]:
    """Return the specs of the multi-head model of h 2 with each setting, by name."""
    spec = next(iter(compared_models(settings).values()))["MH-MoE h 2"]
    trains = {n: TrainSpec.model_validate({**spec.train.model_dump(), **PLAIN, **k}) for n, k in SETTINGS.items()}
    return {name: spec.model_copy(update={"train": train}) for name, train in trains.items()}


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield two cases: times and memory of steps with each setting, and times of the update alone."""
    yield PartCase("whole steps", partial(measure_steps, settings, step_specs(settings), "plain"))
    yield PartCase("update", partial(_measure_update, settings))


def _measure_update(settings: Settings) -> Rows:
    specs, updates = step_specs(settings), dict[str, Callable[[], object]]()
    for name in UPDATE_BYTES:
        case = StepCase(specs[name], settings.torch_device)
        case.trainer.accumulate(case.batches)
        updates[name] = case.trainer.strategy.optimizer.step
    for name, timing in time_interleaved(updates, settings.rounds, device_clock(settings.torch_device)).items():
        moved_bytes = UPDATE_BYTES[name] * compute_sizes(specs[name].model).parameters
        yield {"name": f"update, {name}", "ms": timing.median * 1e3, "TB/s": moved_bytes / timing.median / 1e12}
