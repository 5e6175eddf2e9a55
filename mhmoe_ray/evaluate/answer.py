"""Computation of an evaluation by the function of the model's family; the run directory stores its result as a file."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch

from mhmoe_ray.checkpoint.manifest import CheckpointManifest, read_manifest
from mhmoe_ray.errors import RunError
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, RoutingCounts, save_evaluation
from mhmoe_ray.evaluate.score import EncoderFigures, Score, VisionFigures
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location, location

# Smallest time between two lines about the progress of a domain. A line for every batch would flood the log of the job.
PROGRESS_SECONDS = 5.0

Progress = Callable[[str, int, int], None]
"""Function that reports what is evaluated, and the numbers of finished and of all samples."""


class EvaluationContext(NamedTuple):
    """Input of an evaluation."""

    request: EvalRequest
    run: RunDir
    checkpoint: Location
    manifest: CheckpointManifest
    print_line: Callable[[str], None]
    on_progress: Progress


class EvaluationAnswer(TypedDict, total=False):
    """Fields of `Evaluation` that an evaluation computes, by kind of model."""

    domains: dict[str, Score]
    languages: dict[str, Score]
    routing: dict[str, RoutingCounts]
    tasks: dict[str, dict[str, Any]]
    encoder: EncoderFigures
    vision: VisionFigures


Evaluate = Callable[[EvaluationContext], EvaluationAnswer]
"""Function that evaluates a model of one family."""


def run_evaluation(request: EvalRequest, print_line: Callable[[str], None]) -> None:
    """Compute a requested evaluation in this process, on its GPU if requested, and store it in the run directory.

    Unreadable inputs, data of another run, or tasks that the model cannot do are an MhmoeError.
    """
    start_time = time.monotonic()
    # torch may use as many threads as the job has reserved CPUs for this process.
    torch.set_num_threads(request.cpus)
    run = RunDir(location(request.run))
    checkpoint = run.checkpoints / request.checkpoint
    manifest = read_manifest(checkpoint, parts=("weights",))
    model = manifest.model
    if request.tasks and not model.family.predicts_next_token:
        raise RunError(
            f"run {run.id}", f"its model is {model.family.title}, and lm-eval's tasks are for decoders", "name no tasks"
        )
    on_progress = _progress_callback(print_line)
    evaluate: Evaluate = model.family.part("evaluation")
    figures = evaluate(EvaluationContext(request, run, checkpoint, manifest, print_line, on_progress))
    seconds = time.monotonic() - start_time
    save_evaluation(
        run, Evaluation(request=request, step=manifest.step, tokens=manifest.tokens, seconds=seconds, **figures)
    )


def _progress_callback(print_line: Callable[[str], None]) -> Progress:
    """Return a callback that prints progress at most every `PROGRESS_SECONDS`, and at a domain's end."""
    last_line_time = 0.0

    def report_progress(domain: str, finished_count: int, sample_count: int) -> None:
        nonlocal last_line_time
        if finished_count == sample_count or time.monotonic() - last_line_time > PROGRESS_SECONDS:
            last_line_time = time.monotonic()
            print_line(f"{domain} {finished_count:,} of {sample_count:,} samples")

    return report_progress
