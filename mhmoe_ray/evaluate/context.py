"""Types for the input and the result of an evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.evaluate.request import EvalRequest, RoutingCounts
from mhmoe_ray.evaluate.score import EncoderFigures, Score, VisionFigures
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location

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
