"""Types for the input of an evaluation (its context) and for its result."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.evaluate.request import EvalRequest, RoutingCounts
from mhmoe_ray.evaluate.score import EncoderFigures, Score, VisionFigures
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location

Progress = Callable[[str, int, int], None]
"""Function that reports progress: the name of what is evaluated, and the numbers of finished and of all samples."""


class EvaluationContext(NamedTuple):
    """Input of an evaluation: its request, its checkpoint, and functions that report progress."""

    request: EvalRequest
    run: RunDir
    checkpoint: Location
    manifest: CheckpointManifest
    """Manifest of the checkpoint."""
    print_line: Callable[[str], None]
    """Function that prints a line about progress."""
    on_progress: Progress


class EvaluationAnswer(TypedDict, total=False):
    """Result of an evaluation as fields of `Evaluation`; which of them are present depends on the kind of the model."""

    domains: dict[str, Score]
    languages: dict[str, Score]
    routing: dict[str, RoutingCounts]
    tasks: dict[str, dict[str, Any]]
    encoder: EncoderFigures
    vision: VisionFigures


Evaluate = Callable[[EvaluationContext], EvaluationAnswer]
"""Function that evaluates a model of one family."""
