"""Request of `mhmoe eval`, and the evaluation that is its result, which is stored in the run directory."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel

from mhmoe_ray.evaluate.score import EncoderFigures, FamilyFigures, Score, VisionFigures
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location, location, write_json


class RoutingCounts(BaseModel):
    """Counts of the routes (choices of an expert by a sub-token) of one text, by layer.

    L: mixture-of-experts layers, E: experts, h: heads, k: choices of each sub-token.
    """

    tokens: int
    """Number of tokens whose routes were counted."""
    counts: list[list[int]]
    """L x E: number of routes to each expert."""
    tokens_of: list[list[int]]
    """L x E: number of tokens with at least one sub-token that goes to the expert."""
    distinct: list[list[int]]
    """L x (h*k + 1): number of tokens whose sub-tokens go to n different experts in total, for n from 0 to h*k."""
    agreement: list[list[list[int]]]
    """L x h x h: number of tokens whose sub-tokens of heads i and j have the same first choice."""
    first_weight: list[float]
    """L: sum over all sub-tokens of the gate (routing weight) of their first choice."""


class EvalRequest(BaseModel):
    """Request for an evaluation: a checkpoint, the data and tasks to evaluate it on, and the resources to use."""

    run: str
    """Path of the run directory."""
    checkpoint: str
    """Name of the checkpoint."""
    prepared: str | None
    """Prepared folder whose held-out samples are evaluated; None to evaluate no held-out samples."""
    text: DataSpec | None
    """Raw text or images to evaluate instead of held-out samples; None for no raw data."""
    text_version: str | None = None
    """Hash that changes with the files of `text` (`data.sources.version_hash`).

    It is None without `text`, and in requests of earlier versions.
    """
    samples: int
    """Largest number of samples of each domain of raw text, or of different images in each domain of images."""
    tasks: list[str]
    """Names of lm-eval's tasks; `english` and `xnli` stand for tasks of the first MH-MoE paper."""
    task_folders: list[str]
    """Folders with tasks for lm-eval that the user has defined."""
    tasks_version: str | None = None
    """Hash that changes with the files of `task_folders`; None without folders, and in requests of earlier versions."""
    limit: int | None
    """Largest number of questions of each task; None asks all."""
    batch: int
    """Number of sequences per forward pass."""
    half: bool
    """True to compute matrix products in bfloat16."""
    cpus: int
    gpus: int
    probe: DataSpec | None = None
    """Images on which a linear probe is trained, with their captions as classes; None for no probe.

    The probe then classifies the images of `text`.
    """
    probe_version: str | None = None
    """Hash that changes with the files of `probe`."""
    prior: Literal["uniform", "updating", "cached"] | None = None
    """Prior probabilities of domains for a model with router `domain`, whose experts then predict together.

    It is None if the domain of each text is known, and for models with other routers.
    """

    @property
    def key(self) -> str:
        """Name of the evaluation's file without its suffix: the checkpoint and a hash of the request.

        The hash leaves out the run directory, the batch size and the resources, so requests for the same results have
        the same key. The key changes if a file of the raw data or of the task folders changes.
        """
        return f"{self.checkpoint}-{self._digest({'run', 'batch', 'cpus', 'gpus'})}"

    @property
    def question_digest(self) -> str:
        """Hash of the request without its run, checkpoint, batch size and resources.

        It is the same for evaluations that ask the same of checkpoints of different runs.
        """
        return self._digest({"run", "batch", "cpus", "gpus", "checkpoint"})

    def _digest(self, excluded_fields: set[str]) -> str:
        """Return the first eight characters of the hash of all fields but `excluded_fields`."""
        # Fields that are None are left out of the hash, which then stays the same as in earlier versions without these
        # fields.
        unset_fields = {
            name
            for name in ("prior", "probe", "probe_version", "tasks_version", "text_version")
            if getattr(self, name) is None
        }
        question_fields = self.model_dump(mode="json", exclude=excluded_fields | unset_fields)
        return hashlib.sha256(json.dumps(question_fields, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def description(self) -> str:
        """Description of what is evaluated, for the user; empty if the request names no data and no tasks."""
        parts = ["held-out samples"] if self.prepared else []
        if self.text:
            parts.append(f"{'pictures' if self.text.has_images else 'text'} {', '.join(self.text.sources)}")
        if self.tasks:
            parts.append(f"tasks {', '.join(self.tasks)}")
        if self.probe:
            parts.append(f"a linear probe on {', '.join(source.path for source in self.probe.sources.values())}")
        return " and ".join(parts)


class Evaluation(BaseModel):
    """Result of an evaluation: scores, counts of routes, and results of tasks."""

    request: EvalRequest
    step: int
    """Training step of the checkpoint."""
    tokens: int
    """Number of tokens that the checkpoint was trained on."""
    seconds: float
    """Duration of the evaluation in seconds."""
    domains: dict[str, Score] = {}
    """Scores by domain; empty if no text was evaluated."""
    languages: dict[str, Score] = {}
    """Scores by language, over the domains whose folders are named after a language."""
    routing: dict[str, RoutingCounts] = {}
    """Counts of routes (choices of experts) by domain; empty for a dense model."""
    tasks: dict[str, dict[str, Any]] = {}
    """lm-eval's results by task: metrics and their standard errors."""
    encoder: EncoderFigures | None = None
    """Results for an encoder; None for another kind of model."""
    vision: VisionFigures | None = None
    """Results for a vision model; None for another kind of model."""

    def __repr__(self) -> str:
        parts = [repr(f"{location(self.request.run).name}/{self.request.checkpoint}")]
        if self.domains:
            score = self.total_score
            perplexity = "inf" if score.perplexity is None else f"{score.perplexity:.4g}"
            parts += [f"loss={score.loss:.4f}", f"perplexity={perplexity}"]
        if self.tasks:
            parts.append(f"tasks={self.tasks!r}")
        if self.family_figures is not None:
            parts += self.family_figures.texts()
        return f"Evaluation({', '.join(parts)})"

    __str__ = __repr__

    @property
    def family_figures(self) -> FamilyFigures | None:
        """Results that only the model's family has; None for a decoder."""
        return self.encoder or self.vision

    @property
    def total_score(self) -> Score:
        """Sum of the scores of all domains."""
        return sum(self.domains.values(), Score())

    @property
    def quality(self) -> dict[str, float]:
        """Accuracies, precisions and recalls by name; empty for a decoder, whose quality is measured by its loss."""
        return {} if self.family_figures is None else self.family_figures.quality()


def save_evaluation(run: RunDir, evaluation: Evaluation) -> Location:
    """Store an evaluation in the run directory and return its path."""
    path = run.evaluations / f"{evaluation.request.key}.json"
    write_json(path, evaluation.model_dump(mode="json"))
    return path


def load_evaluation(run: RunDir, request: EvalRequest) -> Evaluation | None:
    """Return the stored evaluation that is the result of a request; None if the run directory has none."""
    path = run.evaluations / f"{request.key}.json"
    return Evaluation.model_validate_json(path.read_text()) if path.exists() else None


def load_evaluations(run: RunDir) -> list[Evaluation]:
    """Return all evaluations of a run, sorted by training step and then by file name."""
    if not run.evaluations.exists():
        return []
    evaluations = [Evaluation.model_validate_json(p.read_text()) for p in run.evaluations.glob("*.json")]
    return sorted(evaluations, key=lambda e: (e.step, e.request.key))
