"""What `mhmoe eval` asks of its job and gets, with counts of routes; kept in the run directory."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.storage import Location, write_json


class RoutingCounts(BaseModel):
    """Of some text. L mixture-of-experts layers, E experts, h heads, k choices of each sub-token."""

    tokens: int
    counts: list[list[int]]
    """L x E: routes."""
    tokens_of: list[list[int]]
    """L x E: tokens of which at least one sub-token goes there."""
    distinct: list[list[int]]
    """L x (h*k + 1): tokens by the number of different experts that their sub-tokens go to together."""
    agreement: list[list[list[int]]]
    """L x h x h: tokens whose sub-tokens i and j have the same first choice."""
    first_weight: list[float]
    """L: sum of the first choices' weights over all sub-tokens."""


class EvalRequest(BaseModel):
    run: str
    """Path of the run directory."""
    checkpoint: str
    """Its name."""
    prepared: str | None
    """Folder whose held-out samples are read."""
    text: DataSpec | None
    """Or raw text."""
    samples: int
    """Of each domain of raw text, at most."""
    tasks: list[str]
    """Of lm-eval."""
    task_folders: list[str]
    """With tasks of the user's own."""
    limit: int | None
    """Questions of each task, at most."""
    batch: int
    half: bool
    """Matrix products in bfloat16."""
    cpus: int
    gpus: int

    @property
    def key(self) -> str:
        """Of the file that the answer is kept in: equal for equal questions, whatever computes them."""
        asked = self.model_dump(mode="json", exclude={"run", "batch", "cpus", "gpus"})
        return f"{self.checkpoint}-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]}"

    @property
    def said(self) -> str:
        """In a word, what of."""
        parts = ["held-out text"] if self.prepared else []
        if self.text:
            parts.append(f"text {', '.join(self.text.sources)}")
        if self.tasks:
            parts.append(f"tasks {', '.join(self.tasks)}")
        return " and ".join(parts)


class Evaluation(BaseModel):
    request: EvalRequest
    step: int
    tokens: int
    """That the checkpoint was trained on."""
    seconds: float
    domains: dict[str, Score]
    languages: dict[str, Score]
    """Of the domains whose folders are named by a language."""
    routing: dict[str, RoutingCounts]
    """By domain; empty for a dense model."""
    tasks: dict[str, dict[str, Any]]
    """lm-eval's results by task: metrics and their standard errors."""

    @property
    def total(self) -> Score:
        return sum(self.domains.values(), Score())


def store(run: RunDir, evaluation: Evaluation) -> Location:
    path = run.evaluations / f"{evaluation.request.key}.json"
    write_json(path, evaluation.model_dump(mode="json"))
    return path


def stored(run: RunDir, request: EvalRequest) -> Evaluation | None:
    path = run.evaluations / f"{request.key}.json"
    return Evaluation.model_validate_json(path.read_text()) if path.exists() else None


def all_stored(run: RunDir) -> list[Evaluation]:
    """Of a run, the least trained first, of equal ones by name."""
    if not run.evaluations.exists():
        return []
    found = [Evaluation.model_validate_json(p.read_text()) for p in run.evaluations.glob("*.json")]
    return sorted(found, key=lambda e: (e.step, e.request.key))
