"""Names of the metrics and the history of a run. Whoever computes or keeps one takes its name from here; the command
line prints them by the keys of `mhmoe status --json`, which are these names."""

import math
from collections.abc import Iterable
from typing import Any

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.glimpse import Glimpse
from mhmoe_ray.runs.layout import RunDir

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
