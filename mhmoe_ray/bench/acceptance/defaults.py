"""Whole training steps with each default of GPUs on and off, and the update with moments in bfloat16."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mhmoe_ray.bench.acceptance.ranks import run_ranks
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings, first_line
from mhmoe_ray.bench.acceptance.training import compared_models, measure_steps
from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.bench.timing import device_clock, time_interleaved
from mhmoe_ray.distributed.strategies.fsdp import FsdpStrategy
from mhmoe_ray.planner.search import LOSS_CHUNK_ROWS
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import ClusterSpec, RunSpec, TrainSpec
from mhmoe_ray.train.malloc import use_expandable_segments

PLAIN = {"compile": False, "loss_chunk_rows": None, "recompute": "none"}
PLAIN |= {"residual_precision": "float32", "moment_precision": "float32"}
FAST: dict[str, Any] = {"compile": True, "loss_chunk_rows": LOSS_CHUNK_ROWS}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"compile": True},
    "chunked loss": {"loss_chunk_rows": LOSS_CHUNK_ROWS},
    "bfloat16 residual": {"residual_precision": "bfloat16"},
    "bfloat16 moments": {"moment_precision": "bfloat16"},
    "recomputed blocks": {"recompute": "block"},
    "compile and chunked loss": FAST,
    "compile, chunked loss and bfloat16 residual": {**FAST, "residual_precision": "bfloat16"},
}
"""Keys of the section `train` that differ from `PLAIN`, by the name of the setting."""
WORKER_SETTINGS = {"fsdp": (True, True), "fsdp, root resharded": (False, True), "fsdp, fixed segments": (True, False)}
"""Defaults that no key sets: whether fsdp's root stays gathered, and whether CUDA's allocator expands its segments."""
UPDATE_BYTES = {"plain": 28, "bfloat16 moments": 20}
"""Bytes per value that an update must move: it reads the gradient, and reads and writes the weight and both moments."""


def step_specs(settings: Settings) -> dict[str, RunSpec]:
    """Return the specs of the multi-head model of h 2 with each setting, by name."""
    spec = next(iter(compared_models(settings).values()))["MH-MoE h 2"]
    trains = {n: TrainSpec.model_validate({**spec.train.model_dump(), **PLAIN, **k}) for n, k in SETTINGS.items()}
    return {name: spec.model_copy(update={"train": train}) for name, train in trains.items()}


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield three cases: times and memory of steps with settings of a worker and of a spec, and the update alone."""
    # The workers come first, because this process keeps the memory of the GPU that the other cases allocate.
    yield PartCase("workers", partial(measure_workers, settings))
    yield PartCase("whole steps", partial(measure_steps, settings, step_specs(settings), "plain"))
    yield PartCase("update", partial(_measure_update, settings))


def measure_workers(settings: Settings) -> Rows:
    """Train with each of `WORKER_SETTINGS` in new processes, because an allocator keeps the segments that it has."""
    spec = step_specs(settings)["compile and chunked loss"]
    cluster = {"workers": settings.gpus, "gpus_per_worker": int(settings.device == "cuda"), "strategy": "fsdp"}
    updates = {"cluster": ClusterSpec.model_validate({**cluster, "shard_experts": True})}
    train = spec.train.model_copy(update={"micro_batches": settings.gpus})
    spec = spec.model_copy(update={**updates, "train": train})
    for name, (keeps_root, expands_segments) in WORKER_SETTINGS.items():
        if settings.device == "cpu" and not expands_segments:
            yield {"name": name, "skipped": "only CUDA's allocator has segments"}
            continue
        try:
            [row] = run_ranks(settings, _train_worker, spec, keeps_root, expands_segments)
        # One setting that fails must not hide the results of the others.
        except Exception as error:
            row = {"passed": False, "error": first_line(error)}
        yield {"name": name, **row}


def _train_worker(settings: Settings, spec: RunSpec, keeps_root: bool, expands_segments: bool) -> Rows:
    device = settings.torch_device
    if device.type == "cuda" and expands_segments:
        use_expandable_segments(os.environ)
    case = StepCase(spec, device)
    assert isinstance(case.trainer.strategy, FsdpStrategy)
    case.trainer.strategy.keeps_root_gathered = keeps_root
    case.step()
    peak = peak_bytes(case.step, device)
    timing = time_interleaved({"": case.step}, settings.rounds, device_clock(device))[""]
    row = {"ms": timing.median * 1e3, "peak_gb": peak / 1e9}
    if device.type == "cuda":
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        passed = {segment["is_expandable"] for segment in segments} == {expands_segments}
        row |= {"reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9, "passed": passed}
    yield row


def _measure_update(settings: Settings) -> Rows:
    specs, updates = step_specs(settings), dict[str, Callable[[], object]]()
    for name in UPDATE_BYTES:
        case = StepCase(specs[name], settings.torch_device)
        case.trainer.accumulate(case.batches)
        updates[name] = case.trainer.strategy.optimizer.step
    for name, timing in time_interleaved(updates, settings.rounds, device_clock(settings.torch_device)).items():
        moved_bytes = UPDATE_BYTES[name] * compute_sizes(specs[name].model).parameters
        yield {"name": f"update, {name}", "ms": timing.median * 1e3, "TB/s": moved_bytes / timing.median / 1e12}
