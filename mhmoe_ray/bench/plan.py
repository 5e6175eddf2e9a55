"""Steps of several models in several settings at one and two ranks of this CPU, beside the planner's estimates of them.

An estimate needs ceilings of the machine, which are measured at one and at two ranks: the rates of a rank's matrix
products and copies, and the rate and latency of exchanges over gloo. Two figures cannot be measured alone: the share of
the peak that training reaches, and the seconds of a small operation. They are fitted, for each number of ranks, on
steps of `CALIBRATION_MODELS`, which are not among the models that are judged.
"""

import itertools
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from mhmoe_ray.bench.acceptance.ranks import exit_with_parent, process_group
from mhmoe_ray.bench.steps import StepCase, rank_nodes
from mhmoe_ray.bench.timing import measure_rounds, time_interleaved
from mhmoe_ray.planner.adapt import update_keys, valid_changes
from mhmoe_ray.planner.estimate import estimate_step_time
from mhmoe_ray.planner.placement import Node, build_layout
from mhmoe_ray.spec import RunSpec

TREE: dict[str, Any] = {
    "name": "bench",
    "data": {"sources": {"none": {"path": "none"}}, "prepared": "none", "seq_len": 128},
    "train": {"steps": 1000, "micro_batches": 4, "micro_batch_size": 4},
}
TRUNK = {"vocab_size": 2048, "attention_heads": 4}


def _experts(heads: int, experts: int, top_k: int, d_expert: int) -> dict[str, Any]:
    moe = {"heads": heads, "experts": experts, "top_k": top_k, "d_expert": d_expert, "every": 1}
    return {**TRUNK, "moe": moe}


MODELS: dict[str, dict[str, Any]] = {
    "dense": {**TRUNK, "moe": None, "d_model": 256, "layers": 4, "d_ff": 768},
    "wide": {**_experts(1, 4, 1, 1024), "d_model": 448, "layers": 2},
    "deep": {**_experts(2, 8, 2, 256), "d_model": 128, "layers": 8},
    "fine-grained": {**_experts(4, 48, 4, 128), "d_model": 192, "layers": 3},
}
CALIBRATION_MODELS: dict[str, dict[str, Any]] = {
    "operations": {**_experts(2, 16, 2, 32), "d_model": 32, "layers": 6},
    "products": {**_experts(1, 8, 2, 768), "d_model": 384, "layers": 3},
}
SMALL = {"train.micro_batches": 16, "train.micro_batch_size": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "1 rank, recompute": {"train.recompute": "block"},
    "1 rank, b 1": SMALL,
    "ddp": {"cluster.workers": 2},
    "ddp, b 1": {"cluster.workers": 2, **SMALL},
    "fsdp": {"cluster.workers": 2, "cluster.strategy": "fsdp"},
    "fsdp, b 1": {"cluster.workers": 2, "cluster.strategy": "fsdp", **SMALL},
    "ep 2": {"cluster.workers": 2, "cluster.ep": 2},
    "ep 2, recompute": {"cluster.workers": 2, "cluster.ep": 2, "train.recompute": "exchange"},
    "ep 2, by node": {"cluster.workers": 2, "cluster.ep": 2, "cluster.dispatch": "hierarchical"},
}
"""Settings with the same samples in a step. Those that a model cannot have are left out."""
CALIBRATION_SETTINGS = {name: SETTINGS[name] for name in ("1 rank", "ddp")}
SHARES, OPERATION_SECONDS = np.linspace(0.2, 1, 33), np.geomspace(2e-6, 2e-4, 41)
"""Values that are tried for the share of the peak FLOP/s and for the seconds of an operation."""

Case = tuple[str, str]
"""Names of a model and of a setting."""
CEILINGS = "ceilings"


class Calibration(NamedTuple):
    """Properties of the machine at one number of ranks, with which steps are planned."""

    ceilings: dict[str, float]
    """`float32_flops` and `memory_bandwidth` of a rank; at several ranks, `bandwidth` and `latency` of a link."""
    flops_share: float = 1.0
    operation_seconds: float = 0.0

    def estimate(self, spec: RunSpec) -> float:
        """Return the estimated seconds of a step, without overlap: exchanges take time of the cores that compute."""
        rates = {key: self.ceilings[key] for key in ("float32_flops", "memory_bandwidth")}
        rates |= {"flops_share": self.flops_share, "memory_share": 1.0, "launch_seconds": self.operation_seconds}
        link = {key: self.ceilings[key] for key in ("bandwidth", "latency") if key in self.ceilings}
        network = spec.cluster.network
        links = {name: getattr(network, name).model_copy(update=link) for name in ("node", "domain")}
        keys = {
            "cluster.accelerator": spec.cluster.accelerator.model_copy(update=rates),
            "cluster.network": network.model_copy(update={"share": 1.0, **links}),
        }
        layout = build_layout([Node(node, 1, 1) for node in rank_nodes(spec.cluster)], spec.cluster.ep)
        return estimate_step_time(update_keys(spec, keys), layout).sequential_seconds


class PlanFigures(NamedTuple):
    """Estimated and measured seconds of steps, by the names of model and setting."""

    calibrations: dict[int, Calibration]
    """By number of ranks."""
    estimated: dict[Case, float]
    measured: dict[Case, list[float]]
    """Seconds of a step, one value per round; those of the calibration come first."""

    def rank_correlation(self, model: str | None = None) -> float:
        """Return Spearman's rank correlation of estimates and median times, over all settings or those of a model."""
        cases = [case for case in self.estimated if model in (None, case[0])]
        times = [[self.estimated[case] for case in cases], [median(self.measured[case]) for case in cases]]
        return float(np.corrcoef([_ranks(seconds) for seconds in times])[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    # Equal values get the mean of their ranks.
    ordered = sorted(values)
    return [float(np.mean([np.searchsorted(ordered, v, side) for side in ("left", "right")])) for v in values]


def build_specs(models: Mapping[str, Any], settings: Mapping[str, dict[str, Any]]) -> dict[Case, RunSpec]:
    """Return the specs of all models in all settings that they can have."""
    specs = {}
    for (model, section), (setting, keys) in itertools.product(models.items(), settings.items()):
        base = RunSpec.model_validate({**TREE, "model": section})
        for _, spec in valid_changes(base, [keys]):
            specs[model, setting] = spec
    return specs


def measure(
    specs: Mapping[Case, RunSpec], calibration_specs: Mapping[Case, RunSpec], rounds: int, report: Callable[[str], None]
) -> PlanFigures:
    """Measure ceilings, calibrating steps and steps in interleaved rounds, and estimate the steps."""
    all_specs = {**calibration_specs, **specs}
    worlds = sorted({spec.cluster.max_world_size for spec in all_specs.values()})
    cases: list[Case] = [(CEILINGS, str(world)) for world in worlds]
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context, exit_with_parent)) for _ in range(worlds[-1])]

        def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
            with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
                ranks = enumerate(pools[:world])
                futures = [pool.submit(function, Path(folder), rank, world, *arguments) for rank, pool in ranks]
                return [future.result() for future in futures]

        def measure_case(case: Case, number: int) -> list[Any]:
            if case[0] == CEILINGS:
                report(f"round {number + 1} of {rounds}: {case[1]} ranks")
                return on_ranks(int(case[1]), _measure_ceilings)
            return on_ranks(all_specs[case].cluster.max_world_size, _measure_step, all_specs[case])

        results = measure_rounds([*cases, *all_specs], rounds, measure_case)
    seconds = {case: [max(ranks) for ranks in results[case]] for case in all_specs}
    calibrations = {}
    for world, case in zip(worlds, cases, strict=True):
        rank_results = [result for ranks in results[case] for result in ranks]
        ceilings = {key: median(result[key] for result in rank_results) for key in rank_results[0]}
        steps = [
            (spec, median(seconds[case]))
            for case, spec in calibration_specs.items()
            if spec.cluster.max_world_size == world
        ]
        calibrations[world] = calibrate(steps, ceilings)
    estimated = {case: calibrations[spec.cluster.max_world_size].estimate(spec) for case, spec in specs.items()}
    return PlanFigures(calibrations, estimated, seconds)


def calibrate(steps: Sequence[tuple[RunSpec, float]], ceilings: dict[str, float]) -> Calibration:
    """Return the calibration with which the estimates of some steps are nearest to their measured seconds."""
    choices = itertools.product([ceilings], SHARES.tolist(), OPERATION_SECONDS.tolist())
    return min(
        itertools.starmap(Calibration, choices),
        key=lambda calibration: sum(math.log(calibration.estimate(spec) / seconds) ** 2 for spec, seconds in steps),
    )


def _measure_ceilings(folder: Path, rank: int, world: int) -> dict[str, float]:
    """Return the ceilings of this rank while all ranks measure theirs."""
    torch.set_num_threads(1)
    size, matrix, source = 1024, torch.randn(1024, 1024), torch.zeros(1 << 24)
    target, word = torch.zeros_like(source), torch.zeros(world)
    cases: dict[str, Callable[[], object]] = {"product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    with process_group("cpu", folder, rank, world) if world > 1 else nullcontext():
        if world > 1:
            cases["message"] = lambda: dist.all_to_all_single(torch.empty_like(word), word)
            cases["exchange"] = lambda: dist.all_to_all_single(target, source)
        seconds = {name: timing.median for name, timing in time_interleaved(cases, 5).items()}
    ceilings = {
        "float32_flops": 2 * size**3 / seconds["product"],
        "memory_bandwidth": 2 * source.nbytes / seconds["copy"],
    }
    if world > 1:
        sent_bytes = source.nbytes * (world - 1) / world
        ceilings |= {"bandwidth": sent_bytes / seconds["exchange"], "latency": seconds["message"]}
    return ceilings


def _measure_step(folder: Path, rank: int, world: int, spec: RunSpec) -> float:
    """Return this rank's seconds of a training step."""
    torch.set_num_threads(1)
    with process_group("cpu", folder, rank, world) if world > 1 else nullcontext():
        return time_interleaved({"": StepCase(spec, torch.device("cpu")).step}, 2)[""].median
