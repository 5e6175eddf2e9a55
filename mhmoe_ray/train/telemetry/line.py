"""Line of metrics.jsonl, which has all metrics of one training step.

A straggler shows in the own times of ranks, which are without waits for others (train/stragglers.py).
"""

import time
from typing import Any, NamedTuple

from mhmoe_ray.planner.sizes import model_flops_utilisation
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.metrics import expert_loads, load_entropy
from mhmoe_ray.train.step import StepSums, Trainer, Update


class RankTimes(NamedTuple):
    """Times of a rank in a step: its waits as shares of the step's time, and its own time relative to the others'."""

    data: float  # for the data stream
    exchange: float  # for rows of other ranks: small on a straggler, and large on the ranks that wait for it
    slowdown: float = 1.0  # own time over the median of the other ranks'


def step_line(
    trainer: Trainer, group: int, totals: StepSums, digest: str, rank_times: RankTimes, update: Update, seconds: float
) -> dict[str, Any]:
    """Return the metrics of a step by name, for a line of metrics.jsonl.

    `trainer` is the trainer after the step, `totals` are over all ranks, `digest` is of the step's samples in their
    order, and `rank_times` has the largest values of any rank.
    """
    spec = trainer.spec
    moe, tokens_per_s = spec.model.moe, totals.targets / seconds
    line: dict[str, Any] = {
        metrics.STEP: trainer.step,
        metrics.GROUP: group,
        metrics.TIME: time.time(),
        metrics.LOSS: trainer.objective.step_loss(totals.loss, totals.targets, totals.part_sums_P2),
        metrics.GRAD_NORM: update.norm,
        metrics.LR: update.lr,
        metrics.TOKENS: trainer.tokens,
        metrics.TOKENS_PER_S: tokens_per_s,
        metrics.DATA_WAIT: rank_times.data,
        metrics.STREAM: digest,
    }
    if spec.loss_names:
        means = (total / max(1, count) for total, count in totals.part_sums_P2.tolist())
        line[trainer.objective.part_metric] = dict(zip(spec.loss_names, means, strict=True))
    if moe:
        count_LE = totals.count_LE
        line[metrics.DROPPED] = totals.dropped / (totals.dropped + float(count_LE.sum()))
        line[metrics.BALANCE] = totals.balance / spec.train.micro_batches / spec.model.moe_layers
        line[metrics.LEAST_EXPERT] = float(expert_loads(count_LE.numpy()).min())
        line[metrics.ENTROPY] = float(load_entropy(count_LE.numpy()).min())
    if not update.applied:
        line[metrics.SKIPPED] = True
    if trainer.skipped:
        line[metrics.SKIPPED_STEPS] = trainer.skipped
    # Without expert parallelism no row leaves its rank, so these metrics are left out.
    if trainer.mesh.ep > 1:
        sent_bytes = totals.sent_bytes
        line |= {
            metrics.ROWS_SENT: sent_bytes.rows,
            metrics.ROWS_LEAST: totals.least_bytes,
            metrics.COUNTS_SENT: sent_bytes.counts,
        }
        line |= {metrics.ROWS_BETWEEN_NODES: sent_bytes.between_nodes, metrics.EXCHANGE_WAIT: rank_times.exchange}
    if trainer.mesh.world_size > 1:
        line[metrics.SLOWDOWN] = rank_times.slowdown
    if mfu := model_flops_utilisation(spec, tokens_per_s, trainer.mesh.world_size):
        line[metrics.MFU] = mfu
    return line
