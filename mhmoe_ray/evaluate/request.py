"""The request of `mhmoe eval` and the evaluation that answers it, which is stored in the run directory."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel

from mhmoe_ray.evaluate.score import EncoderFigures, Score, VisionFigures
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location, location, write_json


class RoutingCounts(BaseModel):
    """Counts of the routes of a text, by layer.

    L: mixture-of-experts layers, E: experts, h: heads, k: choices of each sub-token.
    """

    tokens: int
    """Number of tokens whose routes were counted."""
    counts: list[list[int]]
    """L x E: number of routes to the expert."""
    tokens_of: list[list[int]]
    """L x E: number of tokens of which at least one sub-token goes to the expert."""
    distinct: list[list[int]]
    """L x (h*k + 1): number of tokens by the number of different experts that their sub-tokens go to together."""
    agreement: list[list[list[int]]]
    """L x h x h: number of tokens whose sub-tokens i and j have the same first choice."""
    first_weight: list[float]
    """L: sum of the first choices' weights over all sub-tokens."""


class EvalRequest(BaseModel):
    """Request for an evaluation: a checkpoint, the text and the tasks to evaluate it on, and the resources for it."""

    run: str
    """Path of the run directory."""
    checkpoint: str
    """Name of the checkpoint."""
    prepared: str | None
    """Prepared folder whose held-out samples are evaluated; None evaluates none."""
    text: DataSpec | None
    """Raw text to evaluate instead of held-out samples; None evaluates none."""
    text_version: str | None = None
    """Hash that changes with the files of the text (`data.sources.version_hash`); None without text, and in requests of
    earlier versions."""
    samples: int
    """Largest number of samples of each domain of raw text; of pictures, of different images."""
    tasks: list[str]
    """Names of lm-eval's tasks, or `english` or `xnli`."""
    task_folders: list[str]
    """Folders with the user's own tasks."""
    limit: int | None
    """Largest number of questions of each task; None asks all."""
    batch: int
    """Number of sequences per forward pass."""
    half: bool
    """True to compute matrix products in bfloat16."""
    cpus: int
    gpus: int
    probe: DataSpec | None = None
    """Pictures on which a linear probe is trained, whose captions are classes; the pictures of `text` are then
    classified by it. None for everything else."""
    probe_version: str | None = None
    """Hash that changes with the files of `probe`."""
    prior: Literal["uniform", "updating", "cached"] | None = None
    """Prior probabilities of domains for a model with router `domain`, whose experts then predict together; None if the
    domain of each text is known, and for all other models."""

    @property
    def key(self) -> str:
        """Name of the evaluation's file without its suffix: the checkpoint and a hash of the request.

        The hash leaves out the run directory, the batch size and the resources, so requests for the same figures have
        the same key. If a file of the text changes, the key does, too.
        """
        excluded_fields = {"run", "batch", "cpus", "gpus"}
        # Evaluations of earlier versions had none of these fields, and are still found under their names.
        excluded_fields |= {
            name for name in ("prior", "probe", "probe_version", "text_version") if getattr(self, name) is None
        }
        question_fields = self.model_dump(mode="json", exclude=excluded_fields)
        return (
            f"{self.checkpoint}-{hashlib.sha256(json.dumps(question_fields, sort_keys=True).encode()).hexdigest()[:8]}"
        )

    @property
    def description(self) -> str:
        """Description of what is evaluated, for the user; empty if nothing is."""
        parts = ["held-out samples"] if self.prepared else []
        if self.text:
            parts.append(f"{'pictures' if self.text.has_images else 'text'} {', '.join(self.text.sources)}")
        if self.tasks:
            parts.append(f"tasks {', '.join(self.tasks)}")
        if self.probe:
            parts.append(f"a linear probe on {', '.join(source.path for source in self.probe.sources.values())}")
        return " and ".join(parts)


class Evaluation(BaseModel):
    """Result of an evaluation: scores, counts of routes and results of tasks."""

    request: EvalRequest
    step: int
    """Training step of the checkpoint."""
    tokens: int
    """Number of tokens that the checkpoint was trained on."""
    seconds: float
    """Duration of the evaluation."""
    domains: dict[str, Score] = {}
    """Scores by domain; empty if no text was evaluated."""
    languages: dict[str, Score] = {}
    """Scores by language, over the domains whose folders are named after a language."""
    routing: dict[str, RoutingCounts] = {}
    """Counts of routes by domain; empty for a dense model."""
    tasks: dict[str, dict[str, Any]] = {}
    """lm-eval's results by task: metrics and their standard errors."""
    encoder: EncoderFigures | None = None
    """Figures of an encoder; None for another model."""
    vision: VisionFigures | None = None
    """Figures of a vision model; None for another model."""

    def __repr__(self) -> str:
        parts = [repr(f"{location(self.request.run).name}/{self.request.checkpoint}")]
        if self.domains:
            score = self.total_score
            perplexity = "inf" if score.perplexity is None else f"{score.perplexity:.4g}"
            parts += [f"loss={score.loss:.4f}", f"perplexity={perplexity}"]
        if self.tasks:
            parts.append(f"tasks={self.tasks!r}")
        if self.encoder:
            parts += [f"{name}={score.loss:.4f}" for name, score in self.encoder.losses.items()]
        if self.vision:
            parts += [f"{name} top_1={figures.top_1:.4f}" for name, figures in self.vision.classes.items()]
            parts += [f"{name} box_ap={f.precision.box_ap:.4f}" for name, f in self.vision.objects.items()]
        return f"Evaluation({', '.join(parts)})"

    __str__ = __repr__

    @property
    def total_score(self) -> Score:
        """Sum of the scores of all domains."""
        return sum(self.domains.values(), Score())

    @property
    def quality(self) -> dict[str, float]:
        """Accuracies, precisions and recalls by name; empty for a decoder, whose quality is its loss."""
        figures = self.encoder or self.vision
        return figures.quality() if figures else {}


def save_evaluation(run: RunDir, evaluation: Evaluation) -> Location:
    """Store an evaluation in the run directory and return its path."""
    path = run.evaluations / f"{evaluation.request.key}.json"
    write_json(path, evaluation.model_dump(mode="json"))
    return path


def load_evaluation(run: RunDir, request: EvalRequest) -> Evaluation | None:
    """Return the evaluation that answers a request; None if the run directory has none."""
    path = run.evaluations / f"{request.key}.json"
    return Evaluation.model_validate_json(path.read_text()) if path.exists() else None


def load_evaluations(run: RunDir) -> list[Evaluation]:
    """Return all evaluations of a run, sorted by training step and then by file name."""
    if not run.evaluations.exists():
        return []
    evaluations = [Evaluation.model_validate_json(p.read_text()) for p in run.evaluations.glob("*.json")]
    return sorted(evaluations, key=lambda e: (e.step, e.request.key))
