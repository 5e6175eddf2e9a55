"""What Prometheus hears of a run through Ray's metrics: names, which are those of `metrics.py`, and what they mean.

There `ray_` and the prefix stand before a name. Each has the label `run`, and Ray's own.
"""

from mhmoe_ray.runs import metrics

PREFIX = "mhmoe_train_"

RUN = {
    metrics.STEP: "Steps done.",
    metrics.TOKENS: "Tokens predicted so far.",
    metrics.TOKENS_PER_S: "Tokens a second, in the newest step.",
    metrics.LOSS: "Nats per token, in the newest step.",
    metrics.VAL_LOSS: "Nats per held-out token, at the newest validation.",
    metrics.GRAD_NORM: "Norm of the gradient before clipping.",
    metrics.LR: "Learning rate.",
    metrics.MFU: "Model FLOPs utilisation; none on CPUs.",
    metrics.BALANCE: "Balance loss per layer; 1 is uniform.",
    metrics.DROPPED: "Share of routes that found no place.",
    metrics.LEAST_EXPERT: "Share of routes of the least used expert, times their number; 1 is uniform.",
    metrics.ENTROPY: "Entropy of the loads of a layer's experts over its highest, lowest of all layers.",
    metrics.ROWS_SENT: "Bytes of routed rows that left their rank in the newest step.",
    metrics.ROWS_BETWEEN_NODES: "Bytes of them that left their node.",
}
"""Of the whole run."""
SKIPPED_STEPS_TOTAL = metrics.SKIPPED_STEPS, "Steps that updated nothing, since their gradient was not finite."
STEPS = "steps", "Steps that the run is to have."
RANK = {
    metrics.DATA_WAIT: "Share of the newest step's time that the rank waited for the stream.",
    metrics.EXCHANGE_WAIT: "Share of the newest step's time that the rank waited for rows of other ranks.",
}
"""Of each rank, with the label `rank`."""
LAYER_ENTROPY = "layer_entropy", "Entropy of the loads of its experts, over the highest."
"""With the label `layer`."""
EXPERT_LOAD = "expert_load", "Share of its layer's routes, times their number; 1 is uniform."
"""With the labels `layer` and `expert`."""
