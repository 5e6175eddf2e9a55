"""Runs that differ in their seed alone, as one."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.runs import metrics
from mhmoe_ray.spec import ELSEWHERE, RunSpec

_FREE = ELSEWHERE | {"name", "storage", "seed", "origin", "reference"}
"""Sections and keys that do not change what is trained."""


@dataclass(frozen=True)
class Variant:
    name: str
    runs: list[RunFigures]

    def losses(self, step: int) -> dict[int, float]:
        """Validation loss at a step, by seed."""
        return {r.spec.seed: r.validations[step] for r in self.runs if step in r.validations}

    def mean_loss(self, step: int) -> float | None:
        found = list(self.losses(step).values())
        return statistics.fmean(found) if found else None

    def deviation(self, step: int) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        found = list(self.losses(step).values())
        return statistics.stdev(found) if len(found) > 1 else None

    def perplexity(self, step: int) -> float | None:
        """Of the mean loss."""
        return metrics.perplexity(self.mean_loss(step))

    @property
    def first(self) -> RunFigures:
        return self.runs[0]


def variants(runs: Sequence[RunFigures]) -> list[Variant]:
    """In the order in which they first come. Of a variant that has finished runs, the others do not count."""
    found: dict[str, list[RunFigures]] = {}
    for run in runs:
        found.setdefault(_what_is_trained(run.spec), []).append(run)
    names = _short([_stem(same[0].spec.name) for same in found.values()])
    counted = [[run for run in same if run.is_finished] or same for same in found.values()]
    return [Variant(name, same) for name, same in zip(names, counted, strict=True)]


def matched_step(compared: Sequence[Variant]) -> int | None:
    """The last step that every run of them has validated; None without one."""
    validated = [set(run.validations) for variant in compared for run in variant.runs]
    return max(set.intersection(*validated), default=None) if validated else None


def _what_is_trained(spec: RunSpec) -> str:
    return json.dumps(spec.model_dump(mode="json", exclude=_FREE), sort_keys=True)


def _stem(name: str) -> str:
    """Without a sweep's seed."""
    return re.sub(r"-s\d+$", "", name)


def _short(names: Sequence[str]) -> list[str]:
    """Without the words that all begin with, each once."""
    words = [name.split("-") for name in names]
    common = len(list(takewhile(lambda same: len(set(same)) == 1, zip(*words, strict=False)))) if len(names) > 1 else 0
    cut = ["-".join(parts[common:]) or name for parts, name in zip(words, names, strict=True)]
    return [name if cut.count(name) == 1 else f"{name} ({cut[:i].count(name) + 1})" for i, name in enumerate(cut)]
