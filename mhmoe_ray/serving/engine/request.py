"""The interface of engines: requests with sampling parameters in, updates with token ids out, and statistics."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from mhmoe_ray.serving.sampling import SamplingParams
from mhmoe_ray.storage import Location

BUCKET_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Upper bounds of a histogram's buckets, in seconds; one more bucket has no bound."""


@dataclass
class Histogram:
    """Histogram of durations: the number in each bucket, and the sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKET_BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[next((i for i, bound in enumerate(BUCKET_BOUNDS) if seconds <= bound), len(BUCKET_BOUNDS))] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Mean duration in seconds; None if there are no durations."""
        return self.total / self.count if self.count else None


@dataclass
class Stats:
    """Statistics of an engine: counts since its start, and its present state."""

    # The names of the fields are public: they are keys of `/stats` and parts of the names of metrics.
    waiting: int = 0
    """Number of waiting requests; with images, a request also waits while these are decoded."""
    running: int = 0
    cache_used: float = 0.0
    """Share of the KV cache's blocks that requests hold."""
    requests: int = 0
    """Number of requests that finished, failed or were closed by the client."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Number of prompt tokens found in the KV cache."""
    answer_tokens: int = 0
    answer_rate: float = 0.0
    """Tokens of answers per second over the last ten seconds."""
    steps: int = 0
    step_tokens: int = 0
    """Number of tokens in all steps."""
    queue: Histogram = field(default_factory=Histogram)
    """Seconds from arrival to the first step."""
    first_token: Histogram = field(default_factory=Histogram)
    """Seconds from arrival to the first token, or to the first answer if answers have no tokens."""
    each_token: Histogram = field(default_factory=Histogram)
    """Seconds between two tokens of an answer."""
    count_LE: list[list[int]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the statistics as a JSON object, with each histogram's mean and count."""
        plain_values = {name: value for name, value in vars(self).items() if not isinstance(value, Histogram)}
        return plain_values | {
            f"{name}_seconds": {"mean": value.mean, "count": value.count}
            for name, value in vars(self).items()
            if isinstance(value, Histogram)
        }


class Structure(NamedTuple):
    """A form that an answer must have, such as a JSON schema as `value`."""

    kind: Literal["json", "json_object", "regex", "choice", "grammar"]
    value: Any


class Structures(Protocol):
    """The interface by which an engine checks structures of answers, and describes and parses calls of tools."""

    @property
    def has_tool_parser(self) -> bool:
        """True if `parse_calls` can be used."""
        ...

    def check(self, structure: Structure) -> None:
        """Raise ServeError for a structure that the engine cannot enforce."""
        ...

    def call_schema(self, tools: Sequence[dict[str, Any]], name: str | None, is_parallel: bool) -> Any:
        """Return the JSON schema of the arguments of a named tool, or of a list of calls of any tools."""
        ...

    def parse_calls(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
        """Return the text before the calls of an answer, and each call's name and arguments."""
        ...


FinishReason = Literal["stop", "length"]
"""Reason of an answer's end: "stop" at a document's end or a stop string, "length" at a limit on tokens."""


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    sampling_params: SamplingParams
    """Sampling parameters of the answer; with 0 as `max_tokens`, the engine only scores the prompt."""
    prompt_logprobs: bool = False
    client: str = ""
    """Client's name; clients take turns by tokens."""
    adapter: str = ""
    """Name of the adapter that answers; empty for the model alone."""
    structure: Structure | None = None
    """Form of the answer, for engines with `structures`."""
    return_routes: bool = False
    """Whether updates have the experts of each token, for engines that return routes."""

    @property
    def needs_all_tokens(self) -> bool:
        """True if the model has to compute all tokens of the prompt, even those in the KV cache."""
        return self.prompt_logprobs or self.return_routes


class ScoredToken(NamedTuple):
    """A token with its score: its natural log-probability and the likeliest alternatives, likeliest first.

    Scores are those of the model, before temperature, penalties and biases.
    """

    token: int
    logprob: float | None = None
    """Natural log-probability; None without scores, and for a prompt's first token."""
    alternatives: tuple[tuple[int, float], ...] = ()


class TokenRoutes(NamedTuple):
    """A token with the experts that its sub-tokens chose."""

    token: int
    experts: list[list[int]]
    """For each layer with experts, those of all sub-tokens one after another, each sub-token's by preference."""


class AnswerUpdate(NamedTuple):
    """The next part of an answer: new tokens, scores of the prompt, or the end."""

    tokens: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()
    """Scores of all tokens of the prompt, reported once if requested."""
    finish_reason: FinishReason | None = None
    routes: tuple[TokenRoutes, ...] = ()
    """Routes of the tokens that the model computed since the last update: of the prompt first, then of the answer. The
    last token of an answer is never computed."""


class ServedWeights(NamedTuple):
    """Checkpoint whose weights, or adapter, give an answer."""

    run: str
    step: int
    digest: str
    """`CheckpointManifest.weights_sha256`; empty for a model in memory."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers by which a response names its weights."""
        return {"x-mhmoe-run": self.run, "x-mhmoe-step": str(self.step), "x-mhmoe-digest": self.digest}


class ServedEngine(Protocol):
    """The interface that all engines share."""

    @property
    def failure_reason(self) -> str | None:
        """Reason why the engine is broken; None while it works."""
        ...

    def stats(self) -> Stats:
        """Return the statistics up to now."""
        ...

    def close(self) -> None:
        """Stop the engine and fail its unfinished requests. Must be called before the process ends."""
        ...


class TextEngine(ServedEngine, Protocol):
    """The interface of engines of decoders and encoders, which read texts."""

    @property
    def seq_len(self) -> int:
        """Largest number of tokens of prompt and answer together, or of an encoder's text."""
        ...


class Engine(TextEngine, Protocol):
    """The interface of engines of decoders."""

    @property
    def returns_routes(self) -> bool:
        """True if requests may ask for routes."""
        ...

    @property
    def structures(self) -> Structures | None:
        """Structures of answers; None if the engine only generates text."""
        ...

    @property
    def adapters(self) -> Mapping[str, ServedWeights]:
        """Adapters by the names that requests may give as their model."""
        ...

    def set_adapters(self, checkpoints: Mapping[str, Location]) -> None:
        """Serve the adapters of these checkpoints, by name, and no others. Requests go on meanwhile.

        Requests that began with a removed adapter keep it. The adapters were trained on weights equal to the engine's.

        Raises:
            CheckpointError, ServeError: an adapter is damaged, or the engine cannot compute it. The others are served.
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[AnswerUpdate, None]:
        """Yield the answer in parts as they are computed. Closing the generator early aborts the request.

        Raises:
            BusyError: too many requests wait already.
            EngineError: the engine is broken.
        """
        ...


class BusyError(Exception):
    """Error of a request that is refused because too many wait; the client should retry later."""


class EngineError(Exception):
    """Error of an engine that cannot answer this request, or any request."""
