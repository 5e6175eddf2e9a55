"""A run's metrics: their names, here, in Prometheus and in trackers, and looks into their history.

Whoever computes or keeps a metric takes its name from here; the command line prints by it. For Prometheus `ray_` and
the prefix stand before a name, and each has the label `run` and Ray's own. A history may have a million lines, so
`course` takes a few looks into it. Nothing here needs torch.
"""

import math
from collections.abc import Iterable
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.jsonl import Glimpse

STEP = "step"
GROUP = "group"  # which start of the worker group wrote the line, from 1
TIME = "time"
LOSS = "loss"  # nats per token, mean over the step
BALANCE = "balance"  # balance loss per layer; 1 is uniform
GRAD_NORM = "grad_norm"  # before clipping
LR = "lr"
TOKENS = "tokens"  # predicted so far, padding not counted
TOKENS_PER_S = "tokens_per_s"  # of those
DATA_WAIT = "data_wait"  # share of the step's time that the slowest rank waited for the stream
EXCHANGE_WAIT = "exchange_wait"  # share of the step's time that the slowest rank waited for rows of other ranks
MFU = "mfu"  # model FLOPs over the peak of `cluster.accelerator`; absent on CPUs
STREAM = "stream"  # digest of the step's samples, in order
DROPPED = "dropped"  # share of routes that found no place
LEAST_EXPERT = "least_expert"  # smallest share of routes that an expert got, times E; 1 is uniform
ENTROPY = "entropy"  # of the loads of a layer's experts, over the highest; the lowest of all layers; 1 is uniform
ROWS_SENT = "rows_sent"  # bytes of routed rows, outputs and gradients that left their rank, over all ranks
ROWS_LEAST = "rows_least"  # below which that cannot be in flat dispatch, for the routes of the step
ROWS_BETWEEN_NODES = "rows_between_nodes"  # bytes of ROWS_SENT that left their node
COUNTS_SENT = "counts_sent"  # bytes of numbers of rows that left their rank, over all ranks
SKIPPED = "skipped"  # true where the step updated nothing, since its gradient was not finite
SKIPPED_STEPS = "skipped_steps"  # such steps so far; absent while there are none
VAL_LOSS = "val_loss"  # nats per token
VAL_TOKENS = "val_tokens"

_MOST_NATS = 709.0  # of which a float holds the exponential


def perplexity(loss: float | None) -> float | None:
    """Of a loss in nats per token; None where there is none, it is not finite, or it is beyond what a float holds."""
    return math.exp(loss) if loss is not None and loss < _MOST_NATS else None


def append(run: RunDir, line: dict[str, Any]) -> None:
    """A number that is not finite, for which JSON has no word, becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    jsonl.append(run.metrics_file, finite, at_once=False)


def flush(run: RunDir) -> None:
    """Return when all lines of this process can be read; at once but on an object store."""
    jsonl.flush(run.metrics_file)


def history(run: RunDir) -> list[dict[str, Any]]:
    """One line per step, in order: the effective history, where a restart has taken the place of what it repeated."""
    # On an object store segments are in the order of their writers' clocks, and a later start may be on another node.
    return effective(sorted(jsonl.read(run.metrics_file), key=lambda line: line.get(GROUP, 0)))


def effective(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that a later one has taken the place of."""
    found: list[dict[str, Any]] = []
    for line in lines:
        while found and found[-1][STEP] >= line[STEP]:
            found.pop()
        found.append(line)
    return found


def last(run: RunDir) -> dict[str, Any] | None:
    """The newest line."""
    return next(Glimpse(run.metrics_file).backwards(), None)


PREFIX = "mhmoe_train_"

RUN = {
    STEP: "Steps done.",
    TOKENS: "Tokens predicted so far.",
    TOKENS_PER_S: "Tokens a second, in the newest step.",
    LOSS: "Nats per token, in the newest step.",
    VAL_LOSS: "Nats per held-out token, at the newest validation.",
    GRAD_NORM: "Norm of the gradient before clipping.",
    LR: "Learning rate.",
    MFU: "Model FLOPs utilisation; none on CPUs.",
    BALANCE: "Balance loss per layer; 1 is uniform.",
    DROPPED: "Share of routes that found no place.",
    LEAST_EXPERT: "Share of routes of the least used expert, times their number; 1 is uniform.",
    ENTROPY: "Entropy of the loads of a layer's experts over its highest, lowest of all layers.",
    ROWS_SENT: "Bytes of routed rows that left their rank in the newest step.",
    ROWS_BETWEEN_NODES: "Bytes of them that left their node.",
}
"""Of the whole run."""
SKIPPED_STEPS_TOTAL = SKIPPED_STEPS, "Steps that updated nothing, since their gradient was not finite."
STEPS = "steps", "Steps that the run is to have."
RANK = {
    DATA_WAIT: "Share of the newest step's time that the rank waited for the stream.",
    EXCHANGE_WAIT: "Share of the newest step's time that the rank waited for rows of other ranks.",
}
"""Of each rank, with the label `rank`."""
LAYER_ENTROPY = "layer_entropy", "Entropy of the loads of its experts, over the highest."
"""With the label `layer`."""
EXPERT_LOAD = "expert_load", "Share of its layer's routes, times their number; 1 is uniform."
"""With the labels `layer` and `expert`."""


def load(count_LE: np.ndarray) -> np.ndarray:
    """The shares of routes that a layer's experts got, times E: 1 is uniform; 0 throughout where there are no routes.

    Args:
        count_LE: routes per layer and expert.

    Returns:
        (L, E), float64.
    """
    return np.asarray(_share(count_LE) * count_LE.shape[1])


def load_entropy(count_LE: np.ndarray) -> np.ndarray:
    """Entropy of the shares of routes that a layer's experts got, over the highest, log E: 1 is uniform; 0 is all to
    one of them, or no routes at all.

    Args:
        count_LE: routes per layer and expert, of at least two experts.

    Returns:
        (L,), float64.
    """
    share_LE = _share(count_LE)
    log_LE = np.log(share_LE, where=share_LE > 0, out=np.zeros_like(share_LE))
    return np.asarray(-(share_LE * log_LE).sum(1) / math.log(count_LE.shape[1]))


def _share(count_LE: np.ndarray) -> np.ndarray:
    return np.asarray(count_LE / count_LE.sum(1, keepdims=True).clip(min=1))


class Course(NamedTuple):
    recent: list[dict[str, Any]]
    """Of the effective history, the newest lines."""
    validation: dict[str, Any] | None
    """The newest line with a validation."""
    curve: list[dict[str, Any]]
    """Lines from all over the effective history, in order; all of it where it is short."""
    start: dict[str, Any] | None
    """The first line of the newest start of workers."""

    @property
    def last(self) -> dict[str, Any] | None:
        return self.recent[-1] if self.recent else None

    @property
    def rate(self) -> float | None:
        """Tokens a second over the recent steps, by the time that these took."""
        pairs = [(b[TOKENS] - a[TOKENS], b[TOKENS_PER_S]) for a, b in pairwise(self.recent) if a[GROUP] == b[GROUP]]
        seconds = sum(tokens / rate for tokens, rate in pairs if tokens)
        return float(sum(tokens for tokens, _ in pairs) / seconds) if seconds else None

    @property
    def mean_rate(self) -> float | None:
        """Tokens a second since the newest start of workers, by the clock: validations and pauses are in it."""
        if self.last is None or self.start is None or self.last[TIME] <= self.start[TIME]:
            return None
        return float((self.last[TOKENS] - self.start[TOKENS]) / (self.last[TIME] - self.start[TIME]))


RECENT = 20
CURVE = 60


def course(run: RunDir, validate_every: int) -> Course:
    """Args:
    run: its directory.
    validate_every: steps between two of its validations.
    """
    file = Glimpse(run.metrics_file)
    newest = list(islice(file.backwards(), CURVE))[::-1]
    if not newest:
        return Course([], None, [], None)
    recent, last_step, group = effective(newest), newest[-1][STEP], newest[-1][GROUP]
    validation = None
    for line in file.backwards():
        # One that was repeated after a restart has a newer line; one that is yet to be repeated does not count.
        if VAL_LOSS in line and line[STEP] <= last_step:
            validation = line
            break
        if line[STEP] <= last_step - validate_every:
            break
    short = len(newest) < CURVE
    return Course(
        recent[-RECENT:],
        validation,
        recent if short else effective([*file.spread(CURVE), newest[-1]]),
        file.first(lambda line: line[GROUP] >= group),
    )


TAGS = {
    LOSS: "loss/training",
    VAL_LOSS: "loss/validation",
    GRAD_NORM: "optimizer/gradient_norm",
    LR: "optimizer/learning_rate",
    TOKENS_PER_S: "speed/tokens_per_second",
    MFU: "speed/mfu",
    DATA_WAIT: "speed/data_wait",
    EXCHANGE_WAIT: "speed/exchange_wait",
    BALANCE: "routing/balance_loss",
    DROPPED: "routing/dropped",
    LEAST_EXPERT: "routing/least_expert",
    ENTROPY: "routing/entropy",
    ROWS_SENT: "exchange/rows_sent",
    ROWS_BETWEEN_NODES: "exchange/rows_between_nodes",
}


def tagged(line: dict[str, Any]) -> dict[str, float]:
    """Those of a step's line that are there and finite."""
    values = {tag: line.get(name) for name, tag in TAGS.items()}
    return {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}
