"""What an engine is asked, what it answers and what it counts: token ids in, token ids out.

Text is `serve/detokenizer.py`'s concern.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

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


FinishReason = Literal["stop", "length"]
"""The end of a document; or a limit on tokens."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: penalties and biases first, then the temperature, then the cuts, in this order."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Of the so many most likely tokens; 0: of all."""
    top_p: float = 1.0
    """Of the smallest set whose probabilities add up to this."""
    min_p: float = 0.0
    """Of those at least so many times as likely as the most likely one."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has already."""
    frequency_penalty: float = 0.0
    """Taken from them once for each time."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to logits, by token."""
    seed: int | None = None
    """Answers of equal seeds are equal, whatever else the engine does; None draws a seed."""


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    """At least one."""
    sampling: Sampling
    logprobs: int | None = None
    """How many alternatives to tell beside each token and its log-probability; None: nothing of it."""
    prompt_logprobs: bool = False
    """Tell the same of the prompt."""
    client: str = ""
    """Who asks: those who wait take turns."""


class Scored(NamedTuple):
    """A token and, where asked for, its natural log-probability and the most likely ones in its place, likeliest first:
    the model's own, before temperature, penalties and biases."""

    token: int
    logprob: float | None = None
    """None also for the first token of a prompt, which nothing comes before."""
    alternatives: tuple[tuple[int, float], ...] = ()


class Update(NamedTuple):
    """The next part of an answer."""

    tokens: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    """All of it, once, where asked for."""
    finish: FinishReason | None = None
    """On the last one."""


class Engine(Protocol):
    """`TorchEngine` is one."""

    @property
    def seq_len(self) -> int:
        """Tokens that prompt and answer may have together."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        """The answer, part by part, each as soon as it is there. To close it early ends the work.

        Raises:
            BusyError: too many wait already.
            EngineError: the engine is broken.
        """
        ...

    @property
    def why_broken(self) -> str | None:
        """None as long as it works."""
        ...

    def stats(self) -> Stats:
        """What it has done so far and what it does now."""
        ...

    def close(self) -> None:
        """End it, and answers that are under way. To be called before the process ends."""
        ...


class BusyError(Exception):
    """Come back later."""


class EngineError(Exception):
    """The engine cannot answer, now or ever."""
