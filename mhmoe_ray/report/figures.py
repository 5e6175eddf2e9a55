"""Metrics of a run, and its routes to experts, in the form that plots and tables need."""

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import RunError
from mhmoe_ray.evaluate import activation
from mhmoe_ray.evaluate.request import Evaluation, load_evaluations
from mhmoe_ray.planner.sizes import Sizes, compute_sizes, training_flops
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import read_file


@dataclass(frozen=True)
class RunFigures:
    """Metrics, evaluations and events of one run, read from its run directory."""

    run: RunDir
    spec: RunSpec
    lines: list[dict[str, Any]]
    """Lines of metrics.jsonl, one per step, in order."""

    @classmethod
    def read(cls, run: RunDir) -> "RunFigures":
        """Read the spec and the metrics of a run; an imported run is a RunError."""
        if run.is_imported:
            reason = "it was imported, not trained here, so it has no numbers"
            raise RunError(f"run {run.id}", reason, "leave it out")
        return cls(run, run.spec(), history.read(run))

    @cached_property
    def sizes(self) -> Sizes:
        """Numbers of parameters and multiply-adds of the run's model."""
        return compute_sizes(self.spec.model)

    @cached_property
    def all_evaluations(self) -> list[Evaluation]:
        """All stored evaluations of the run's checkpoints; those of the newest checkpoint are last."""
        return load_evaluations(self.run)

    @property
    def evaluations(self) -> list[Evaluation]:
        """Evaluations on the prepared held-out text, the newest last; those on other texts are left out."""
        return [e for e in self.all_evaluations if e.request.prepared]

    @cached_property
    def run_events(self) -> list[dict[str, Any]]:
        return events.read(self.run)

    @property
    def held_out(self) -> str:
        """Key of the run's held-out text and tokenizer: validation losses of runs with equal keys can be compared."""
        prepared = events.newest_event(self.run_events, "prepared") or {"folder": self.spec.data.prepared}
        names = ("folder", "validation_tokens", "unigram_entropy")
        return f"{self.spec.model.vocab_size} {[str(prepared.get(name)) for name in names]}"

    @property
    def validations(self) -> dict[int, float]:
        """Finite validation losses in nats per token, by step."""
        loss_by_step = {line[metrics.STEP]: line.get(metrics.VAL_LOSS) for line in self.lines}
        return {step: loss for step, loss in loss_by_step.items() if loss is not None and math.isfinite(loss)}

    @property
    def part_validations(self) -> dict[int, dict[str, float]]:
        """Validation losses of the parts of micro-batches, with one objective each, by step and name of the part."""
        lines = (line for line in self.lines if metrics.VAL_PART_LOSS in line)
        return {line[metrics.STEP]: line[metrics.VAL_PART_LOSS] for line in lines}

    @property
    def steps(self) -> int:
        """Number of training steps that the run has done."""
        return int(self.lines[-1][metrics.STEP]) if self.lines else 0

    @property
    def is_finished(self) -> bool:
        """True if the run has done all training steps that its spec asks for."""
        return self.steps >= self.spec.train.steps

    @property
    def has_ended_early(self) -> bool:
        """True if the run ended before its last step."""
        return not self.is_finished and events.is_end_state(events.state(self.run_events))

    @property
    def is_diverged(self) -> bool:
        """True if the last validation loss of the run is not finite."""
        validated = [line for line in self.lines if metrics.VAL_LOSS in line]
        return bool(validated) and validated[-1][metrics.STEP] not in self.validations

    @property
    def tokens_per_s(self) -> float | None:
        """Median throughput in tokens per second over the steps; None without steps."""
        # The first steps after a start are slow. They would distort a mean, but do not affect the median.
        speeds = [line[metrics.TOKENS_PER_S] for line in self.lines]
        return statistics.median(speeds) if speeds else None

    def recent_mean(self, name: str) -> float | None:
        """Return the mean of a metric over the last tenth of the steps; None if none of them has it."""
        values = [line[name] for line in self.lines[-max(1, len(self.lines) // 10) :] if line.get(name) is not None]
        return statistics.fmean(values) if values else None

    @property
    def seconds(self) -> float:
        """Seconds of training without pauses: the sum over worker groups of the time from first to last metrics."""
        times_of_group: dict[int, list[float]] = {}
        for line in self.lines:
            times_of_group.setdefault(line[metrics.GROUP], []).append(line[metrics.TIME])
        return sum(times[-1] - times[0] for times in times_of_group.values())

    def flops(self, tokens: float) -> float:
        """Return the FLOPs of all matrix products of training on `tokens` tokens, as `mhmoe plan` counts them."""
        spec = self.spec
        return tokens * training_flops(spec)


class _RouteRecord(BaseModel):
    """Counts of routes that training stores beside a checkpoint."""

    step: int
    routes_per_layer_and_expert: list[list[int]]


class RouteSummary(NamedTuple):
    """Summary of the routes of a run; fields that only an evaluation of routing gives are None without one."""

    load: np.ndarray
    """Share of each expert in the routes of its layer, times E, so that 1 is an even load, shape (L, E)."""
    source: str
    """Description of the samples whose routes were counted, with the training step."""
    activated: list[float] | None
    """Share of experts that more than a given share of all tokens select, for each share in activation.THRESHOLDS."""
    activated_relative: list[float]
    """Share of experts whose load exceeds a multiple of an even load, by multiple in activation.RELATIVE_THRESHOLDS."""
    distinct: float | None
    """Mean number of different experts per token, divided by its number of routes: 1 means that all are different."""
    agreement: float | None
    """Share of tokens whose two heads have the same first expert, a mean over layers; None with a single head, too."""


def read_routes(figures: RunFigures) -> RouteSummary | None:
    """Return a summary of the routes of a run; None for a dense model and for a run without counts.

    The routes come from the newest evaluation on held-out text; without one, from the newest counts in training.
    """
    evaluated = [e for e in figures.evaluations if e.routing]
    if evaluated:
        total_counts = activation.sum_counts(evaluated[-1].routing.values())
        agreement = activation.mean_head_agreement(total_counts)
        per_token = max(1.0, activation.routes_per_token(total_counts))
        return RouteSummary(
            activation.expert_loads(total_counts.counts),
            f"{evaluated[-1].request.description}, step {evaluated[-1].step:,}",
            activation.activated_shares(total_counts),
            activation.relative_activated_shares(total_counts.counts),
            float(activation.mean_distinct_experts(total_counts).mean()) / per_token,
            None if agreement is None else float(agreement.mean()),
        )
    run = figures.run
    count_files = sorted(path.name for path in run.routing.glob("*.json")) if run.routing.exists() else []
    if not count_files:
        return None
    try:
        record = _RouteRecord.model_validate_json(read_file(run.routing / count_files[-1]))
    except (OSError, ValidationError) as e:
        subject = f"counts of routes {run.routing / count_files[-1]}"
        raise RunError(subject, "they cannot be read, or are damaged", "remove that file") from e
    counts = record.routes_per_layer_and_expert
    if not counts:
        return None
    source = f"training samples up to step {record.step:,}"
    return RouteSummary(
        activation.expert_loads(counts), source, None, activation.relative_activated_shares(counts), None, None
    )


def compare_expert_use(
    baseline: str, variant: str, baseline_routes: RouteSummary, variant_routes: RouteSummary
) -> str | None:
    """Return a sentence that compares the shares of experts in use by threshold; None without evaluated routing."""
    if baseline_routes.activated is None or variant_routes.activated is None:
        return None
    pairs = zip(activation.THRESHOLDS, variant_routes.activated, baseline_routes.activated, strict=True)
    higher_shares: list[str] = []
    lower_shares: list[str] = []
    for threshold, variant_share, baseline_share in pairs:
        if variant_share != baseline_share:
            shares = f"{threshold:g} ({variant_share:.1%} to {baseline_share:.1%})"
            (higher_shares if variant_share > baseline_share else lower_shares).append(shares)
    if not higher_shares and not lower_shares:
        return f"{variant} has the same share of its experts in use as {baseline} at every threshold"
    phrases = [f"more at {', '.join(higher_shares)}"] if higher_shares else []
    phrases += [f"fewer at {', '.join(lower_shares)}"] if lower_shares else []
    return f"compared with {baseline}, {variant} has {' and '.join(phrases)} of its experts in use; the rest is equal"
