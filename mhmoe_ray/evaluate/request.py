"""Request of `mhmoe eval`, and the resulting evaluation, which is stored in the run directory."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import RunError
from mhmoe_ray.evaluate.score import EncoderFigures, FamilyFigures, Score, VisionFigures
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location, location, read_file, write_json


class RoutingCounts(BaseModel):
    """Counts of the routes of one text by layer, for L layers, E experts, h heads and k choices per sub-token."""

    tokens: int
    counts: list[list[int]]
    """Number of routes to each expert, L x E."""
    tokens_of: list[list[int]]
    """Number of tokens with a sub-token that goes to the expert, L x E."""
    distinct: list[list[int]]
    """Number of tokens whose sub-tokens go to n different experts, L x (h*k + 1)."""
    agreement: list[list[list[int]]]
    """Number of tokens whose sub-tokens of heads i and j have the same first choice, L x h x h."""
    first_weight: list[float]
    """Sum of the gates of all sub-tokens' first choices, L."""


class EvalRequest(BaseModel):
    """Request for an evaluation: a checkpoint, the data and tasks, and the resources."""

    run: str
    checkpoint: str
    prepared: str | None
    """Prepared folder whose held-out samples are evaluated, if any."""
    text: DataSpec | None
    """Raw text or images to evaluate instead of held-out samples, if any."""
    text_version: str | None = None
    """Hash that changes with the files of `text` (`data.sources.version_hash`); None in earlier versions."""
    samples: int
    """Largest number of samples of each domain of raw text, or of different images."""
    tasks: list[str]
    """Names of lm-eval's tasks, or `english` and `xnli` for those of the first MH-MoE paper."""
    task_folders: list[str]
    """Folders with user-defined tasks for lm-eval."""
    tasks_version: str | None = None
    """Hash that changes with the files of `task_folders`; None in earlier versions."""
    limit: int | None
    """Largest number of questions of each task; None asks all."""
    batch: int
    """Number of sequences per forward pass."""
    half: bool
    """True to compute matrix products in bfloat16."""
    cpus: int
    gpus: int
    probe: DataSpec | None = None
    """Images, with captions as classes, for training a linear probe that classifies the images of `text`."""
    probe_version: str | None = None
    prior: Literal["uniform", "updating", "cached"] | None = None
    """Prior of the domains for router `domain`, whose experts then predict together; None to use known domains."""

    @property
    def key(self) -> str:
        """Name of the evaluation's file without suffix: the checkpoint and a hash of the request and its data.

        Requests that differ only in run directory, batch size and resources share a key.
        """
        return f"{self.checkpoint}-{self._digest({'run', 'batch', 'cpus', 'gpus'})}"

    @property
    def question_digest(self) -> str:
        """Hash of the request without run, checkpoint, batch size and resources, for comparison between runs."""
        return self._digest({"run", "batch", "cpus", "gpus", "checkpoint"})

    def _digest(self, excluded_fields: set[str]) -> str:
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
        """Description of what is evaluated, for the user; empty without data and tasks."""
        parts = ["held-out samples"] if self.prepared else []
        if self.text:
            parts.append(f"{'images' if self.text.has_images else 'text'} {', '.join(self.text.sources)}")
        if self.tasks:
            parts.append(f"tasks {', '.join(self.tasks)}")
        if self.probe:
            parts.append(f"a linear probe on {', '.join(source.path for source in self.probe.sources.values())}")
        return " and ".join(parts)


class Evaluation(BaseModel):
    """Result of an evaluation: scores, counts of routes, and results of tasks."""

    request: EvalRequest
    step: int
    tokens: int
    """Number of tokens that the checkpoint was trained on."""
    seconds: float
    """Duration of the evaluation."""
    domains: dict[str, Score] = {}
    """Scores by domain; empty if no text was evaluated."""
    languages: dict[str, Score] = {}
    """Scores by language, over domains in folders named after a language."""
    routing: dict[str, RoutingCounts] = {}
    """Counts of routes by domain; empty for a dense model."""
    tasks: dict[str, dict[str, Any]] = {}
    """lm-eval's metrics and standard errors by task."""
    encoder: EncoderFigures | None = None
    vision: VisionFigures | None = None

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
        """Accuracies, precisions and recalls by name; empty for a decoder."""
        return {} if self.family_figures is None else self.family_figures.quality()


def save_evaluation(run: RunDir, evaluation: Evaluation) -> Location:
    """Store an evaluation in the run directory and return its path."""
    path = run.evaluations / f"{evaluation.request.key}.json"
    write_json(path, evaluation.model_dump(mode="json"))
    return path


def load_evaluation(run: RunDir, request: EvalRequest) -> Evaluation | None:
    """Return the stored result of a request, if any."""
    path = run.evaluations / f"{request.key}.json"
    return _read_evaluation(path) if path.exists() else None


def load_evaluations(run: RunDir) -> list[Evaluation]:
    """Return all evaluations of a run, sorted by training step, then by file name."""
    if not run.evaluations.exists():
        return []
    evaluations = [_read_evaluation(path) for path in run.evaluations.glob("*.json")]
    return sorted(evaluations, key=lambda e: (e.step, e.request.key))


def _read_evaluation(path: Location) -> Evaluation:
    """Return a stored evaluation; a damaged one is a RunError."""
    try:
        return Evaluation.model_validate_json(read_file(path))
    except (OSError, ValidationError) as e:
        raise RunError(
            f"evaluation {path}", "it cannot be read, or is damaged", "remove it, then evaluate again"
        ) from e
