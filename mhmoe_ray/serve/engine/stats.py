"""What an engine counts."""

from dataclasses import dataclass, field
from typing import Any

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Upper bounds of a histogram's buckets, seconds; a last one has no bound."""


@dataclass
class Histogram:
    """Seconds, by bucket."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class Stats:
    """Counts since the start, and what is so now."""

    waiting: int = 0
    running: int = 0
    cache_used: float = 0.0
    """Share of the cache's blocks that requests hold."""
    requests: int = 0
    """That ended, whichever way."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompts, those whose keys and values were there already."""
    answer_tokens: int = 0
    answer_rate: float = 0.0
    """Tokens of answers a second, over the last ten seconds."""
    steps: int = 0
    step_tokens: int = 0
    """Over all steps: divided by `steps`, the mean batch."""
    queue: Histogram = field(default_factory=Histogram)
    """From a request's arrival to its first step."""
    first_token: Histogram = field(default_factory=Histogram)
    """From its arrival to its first token."""
    each_token: Histogram = field(default_factory=Histogram)
    """Between two tokens of an answer."""
    count_LE: list[list[int]] = field(default_factory=list)
    """Routes per layer and expert."""

    def as_json(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Histogram)}
        return plain | {
            f"{name}_seconds": {"mean": value.mean, "count": value.count}
            for name, value in vars(self).items()
            if isinstance(value, Histogram)
        }
