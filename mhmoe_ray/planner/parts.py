"""Parts of a training step, by whose names `mhmoe bench count`, `mhmoe profile` and the planner agree."""

from mhmoe_ray.planner.family import (
    ATTENTION,
    EXPERTS,
    HEADS,
    MATCH,
    NORMS,
    OUTPUT,
    PATCHES,
    PROJECTIONS,
    ROUTER,
    SHARED,
)
from mhmoe_ray.planner.family import EMBEDDING as EMBEDDINGS

DATA, CASTS, EMBEDDING, BLOCKS, EXCHANGE = "data", "casts of weights", "embedding", "blocks: other", "blocks: exchange"
LOSS, REDUCTION, UPDATE, OTHER_WORK = "output and loss", "weights and gradients", "update", "other"
IDLE = "no kernel"
"""Time in which a GPU runs no kernel."""
SHARED_EXPERT = "blocks: shared expert"
MODULE_PARTS = {
    "attention": "blocks: attention", "router": "blocks: router", "experts": "blocks: experts",
    "head": "blocks: projections", "merge": "blocks: projections", "ffn": "blocks: feed-forward",
    "shared": SHARED_EXPERT, "attention_norm": "blocks: norms", "ffn_norm": "blocks: norms",
}  # fmt: skip
"""Parts of a block's modules, by the last part of their names."""
OPERATOR_PARTS = {
    "mhmoe::route": "blocks: router",
    "mhmoe": "blocks: experts",
    "aten::_scaled_dot": "blocks: attention",
}
"""Parts of operators within compiled blocks, by the start of their names."""
LAYER_PARTS = {
    EMBEDDINGS: EMBEDDING, PATCHES: EMBEDDING, ATTENTION: "blocks: attention", NORMS: "blocks: norms",
    "feed-forward": "blocks: feed-forward", PROJECTIONS: "blocks: projections", ROUTER: "blocks: router",
    EXPERTS: "blocks: experts", SHARED: SHARED_EXPERT, OUTPUT: LOSS, MATCH: LOSS, HEADS: LOSS,
}  # fmt: skip
"""Parts by the planner's names of layers (`ModelPart.name`)."""
STEP_PARTS = [
    DATA, CASTS, EMBEDDING, *dict.fromkeys(MODULE_PARTS.values()), EXCHANGE, BLOCKS, LOSS, REDUCTION, UPDATE,
    OTHER_WORK, IDLE,
]  # fmt: skip
"""All parts, in the order of a table."""
