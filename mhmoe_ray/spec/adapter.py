"""The `train.adapter` section: a low-rank adapter that is trained in place of the model's weights."""

from typing import Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from mhmoe_ray.spec.base import Precision, Section
from mhmoe_ray.spec.model import ModelSpec

AdapterTarget = Literal["query", "key", "value", "out", "projections", "feed_forward", "shared", "router", "experts"]
ATTENTION_TARGETS: tuple[AdapterTarget, ...] = ("query", "key", "value", "out")
DEFAULT_TARGETS: tuple[AdapterTarget, ...] = tuple(t for t in get_args(AdapterTarget) if t != "router")


class AdapterSpec(Section):
    """Low-rank adapter (LoRA, arXiv 2106.09685): each matrix W of its targets acts as W + alpha / rank * B A.

    A is [rank, in] and B [out, rank]. B begins at zero. All weights of the start model are frozen, with the selection
    biases of its routers.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Rate of dropout on the rows that A multiplies, in attention and projections. Adapters of feed-forward layers,
    experts and routers have none."""
    targets: list[AdapterTarget] = Field(default_factory=list)
    """Matrices with an adapter. query, key, value, out: those of attention. projections: head and merge projections of
    MH-MoE. feed_forward: dense feed-forward layers. shared: shared experts. router: logits of linear routers. experts:
    routed experts, each with an adapter of its own. By default all that the model has, but not routers."""

    base_precision: Precision = "float32"
    """Precision in which ranks hold the frozen matrices. bfloat16 halves their memory, and needs `train.precision`
    bfloat16, whose products round them anyway. Embeddings, norms and routers stay float32."""

    def matched_targets(self, model: ModelSpec) -> list[AdapterTarget]:
        """Return the targets in the order of their definition; one that the model lacks is a ValueError."""
        widths = target_widths(model)
        for target in self.targets:
            if target not in widths:
                raise ValueError(
                    f"train.adapter.targets has {target}, which the model lacks: choose from {', '.join(widths)}"
                )
        return [t for t in widths if t in (self.targets or DEFAULT_TARGETS)]

    def check(self, model: ModelSpec) -> None:
        """Raise a ValueError if the adapter does not fit a model."""
        if not model.family.predicts_next_token:
            raise ValueError(f"train.adapter is for decoders, and the model is {model.family.title}: remove it")
        moe, widths = model.moe, target_widths(model)
        if moe is not None and moe.kernel not in ("auto", "grouped"):
            raise ValueError(
                f"model.moe.kernel is {moe.kernel}, but experts with train.adapter have a kernel of their own: set "
                "kernel to auto"
            )
        matched_targets = self.matched_targets(model)
        if self.dropout and not {*ATTENTION_TARGETS, "projections"} & set(matched_targets):
            raise ValueError(
                f"train.adapter.dropout is {self.dropout:g}, but none of {', '.join(matched_targets)} has dropout: "
                "remove it, or add another target"
            )
        for target in matched_targets:
            if self.rank > widths[target]:
                raise ValueError(
                    f"train.adapter.rank is {self.rank}, above the width {widths[target]} of {target}: lower it"
                )


def target_widths(model: ModelSpec) -> dict[AdapterTarget, int]:
    """Return the smallest width of the matrices of each target that a decoder has."""
    d, moe = model.d_model, model.moe
    queries, keys = min(d, model.query_width), min(d, model.kv_width)
    widths: dict[AdapterTarget, int] = {"query": queries, "key": keys, "value": keys, "out": queries}
    if moe is not None and (moe.has_head_projection or moe.has_merge_projection):
        widths["projections"] = min(model.projection_widths)
    if model.dense_layers:
        assert model.d_ff is not None
        widths["feed_forward"] = min(d, model.d_ff)
    if moe is not None:
        if moe.d_shared:
            widths["shared"] = min(d, moe.d_shared)
        if moe.router == "linear":
            widths["router"] = min(model.row_width, moe.experts)
        widths["experts"] = min(model.row_width, moe.d_expert)
    return widths
