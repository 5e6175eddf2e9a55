"""Requests, updates and statistics of an engine, and its interface: token ids in, token ids out.

`serve/detokenizer.py` turns token ids into text.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Upper bounds of a histogram's buckets, in seconds; one more bucket at the end has no bound."""


@dataclass
class Histogram:
    """Counts of durations by bucket, and their sum in seconds."""

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
    """Statistics of an engine: counts since its start, and its present state."""

    waiting: int = 0
    running: int = 0
    cache_used: float = 0.0
    """Share of the cache's blocks that requests hold."""
    requests: int = 0
    """Number of requests that ended, in whatever way."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Number of prompt tokens whose keys and values were already in the cache."""
    answer_tokens: int = 0
    answer_rate: float = 0.0
    """Tokens of answers per second, over the last ten seconds."""
    steps: int = 0
    step_tokens: int = 0
    """Number of tokens over all steps: divided by `steps`, the mean batch size."""
    queue: Histogram = field(default_factory=Histogram)
    """Seconds from a request's arrival to its first step."""
    first_token: Histogram = field(default_factory=Histogram)
    """Seconds from a request's arrival to its first token."""
    each_token: Histogram = field(default_factory=Histogram)
    """Seconds between two tokens of an answer."""
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
""""stop": the document ended, or a stop string came; "length": a limit on tokens was reached."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    They apply in this order: penalties and biases, the temperature, the cuts (top_k, top_p, min_p).
    """

    max_tokens: int
    temperature: float = 1.0
    """Temperature; 0 takes the most likely token."""
    top_k: int = 0
    """Number of most likely tokens that are drawn from; 0 draws from all."""
    top_p: float = 1.0
    """Total probability of the smallest set of most likely tokens that are drawn from."""
    min_p: float = 0.0
    """Smallest probability of a token that is drawn from, as a share of the most likely token's."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer already has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time that the answer has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, by token."""
    seed: int | None = None
    """Seed: answers with equal seeds are equal, whatever else the engine computes; None draws a seed."""


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt, at least one."""
    sampling: Sampling
    logprobs: int | None = None
    """Number of alternatives to report beside each token and its log-probability; None reports no scores."""
    prompt_logprobs: bool = False
    """Whether to report scores of the prompt's tokens too."""
    client: str = ""
    """Name of the client; waiting requests take turns by client."""


class Scored(NamedTuple):
    """A token with its score: its natural log-probability and the most likely tokens in its place, likeliest first.

    Scores are the model's own, before temperature, penalties and biases. They are present only if the request asks for
    them.
    """

    token: int
    logprob: float | None = None
    """None also for the first token of a prompt, because no token precedes it."""
    alternatives: tuple[tuple[int, float], ...] = ()


class Update(NamedTuple):
    """The next part of an answer."""

    tokens: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    """Scores of the whole prompt, reported once if the request asks for them."""
    finish: FinishReason | None = None
    """Reason why the answer ends; set on the last update only."""


class Engine(Protocol):
    """The interface of engines; `TorchEngine` implements it."""

    @property
    def seq_len(self) -> int:
        """Largest number of tokens of prompt and answer together."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        """Yield the answer in parts, each as soon as it is computed. Closing the generator early ends the work.

        Raises:
            BusyError: too many requests wait already.
            EngineError: the engine is broken.
        """
        ...

    @property
    def why_broken(self) -> str | None:
        """The reason why the engine is broken; None while it works."""
        ...

    def stats(self) -> Stats:
        """Return what the engine has counted so far, and its present state."""
        ...

    def close(self) -> None:
        """Stop the engine and end its running answers with an error. Must be called before the process ends."""
        ...


class BusyError(Exception):
    """Too many requests wait; the client should come back later."""


class EngineError(Exception):
    """The engine cannot answer this request, or any request."""
