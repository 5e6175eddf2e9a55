"""Presets: complete models with their training recipe, in families of three sizes.

All families have the trunk of paper P2 (arXiv 2411.16205). The size `base` is the paper's own.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from mhmoe_ray.planner.match import MatchSpec
from mhmoe_ray.planner.sizes import dense_width
from mhmoe_ray.spec.model import default_d_ff

Tree = dict[str, Any]
"""A section of a spec file, as nested dictionaries."""


class Preset(NamedTuple):
    """Complete model with its training recipe."""

    description: str
    trunk: Mapping[str, Any]
    """The `model` section of the spec, without the key `moe`."""
    moe: Callable[[Mapping[str, Any]], Tree] | None
    """Function that returns the `moe` section for a trunk, which may be another model's; None for a dense model."""
    reference: str | None
    """Name of the preset whose expert layers this one is compared with, on the same trunk."""
    train: Mapping[str, Any]
    seq_len: int
    match: MatchSpec | None = None
    """Match with a reference that solves for the keys `d_expert` and `experts` of `moe`; None if `moe` sets both."""


def constant_moe(**moe: Any) -> Callable[[Mapping[str, Any]], Tree]:
    """Return a function for `Preset.moe` that returns a `moe` section with these keys for any trunk."""
    return lambda _: dict(moe)


def checkpoint_intervals(steps: int) -> Tree:
    """Return `validate_every` and `checkpoint_every` of the `train` section for a run of `steps` steps."""
    # A run has about sixty validations and sixty checkpoints, but at most one of each in 100 steps.
    interval = max(100, steps // 60)
    return {"validate_every": interval, "checkpoint_every": interval}


SizeName = Literal["tiny", "small", "base"]


class Size(NamedTuple):
    """Size of a family's models and of their training.

    The numbers of attention heads, the feed-forward width and the learning rate follow from `d_model`.
    """

    d_model: int
    layers: int
    vocab_size: int
    seq_len: int
    steps: int
    micro_batches: int
    micro_batch_size: int
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def trunk(self) -> Tree:
        """The `model` section, without `moe`, of all families' models of this size."""
        return {
            "backbone": "llama",
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "layers": self.layers,
            "attention_heads": max(4, self.d_model // 64),
            "d_ff": default_d_ff(self.d_model),
        }

    @property
    def train(self) -> Tree:
        """The `train` section of all families' models of this size."""
        # The learning rate is inversely proportional to the width of the model. It is 6e-4 at width 768 in arXiv
        # 2411.16205.
        lr = round(6e-4 * 768 / self.d_model, 6)
        return {
            "steps": self.steps,
            "micro_batches": self.micro_batches,
            "micro_batch_size": self.micro_batch_size,
            "precision": self.precision,
            "lr": lr,
            "min_lr": round(lr / 20, 8),
            **checkpoint_intervals(self.steps),
        }


SIZES: dict[SizeName, Size] = {
    # On two CPU cores, a run of size tiny takes minutes, and one of size small takes hours.
    "tiny": Size(128, 4, 2048, 128, steps=500, micro_batches=2, micro_batch_size=8),
    "small": Size(256, 8, 8192, 256, steps=1000, micro_batches=4, micro_batch_size=8),
    "base": Size(768, 12, 32_000, 2048, steps=100_000, micro_batches=256, micro_batch_size=1, precision="bfloat16"),
}


def _smoe(trunk: Mapping[str, Any]) -> Tree:
    return {"heads": 1, "experts": 8, "top_k": 1, "d_expert": dense_width(trunk)}


def _fine_grained(trunk: Mapping[str, Any]) -> Tree:
    return {"heads": 1, "experts": 16, "top_k": 2, "d_expert": dense_width(trunk) // 2}


def _xmoe(trunk: Mapping[str, Any]) -> Tree:
    return {**_smoe(trunk), "router": "xmoe"}


def _mhmoe(_: Mapping[str, Any]) -> Tree:
    return {"heads": 2, "top_k": 2}


def _deepseek(trunk: Mapping[str, Any]) -> Tree:
    """Return the `moe` section of a DeepSeekMoE model (arXiv 2401.06066)."""
    # The layer has four times as many experts as one of family `smoe`, of a quarter of their width. Three of them and
    # the shared expert compute as much as one expert of `smoe`.
    quarter = dense_width(trunk) // 4
    shape = {"heads": 1, "experts": 32, "top_k": 3, "d_expert": quarter, "d_shared": quarter}
    return {**shape, "balance_choices": "all"}


class Family(NamedTuple):
    """Family of presets: models of one design in all sizes. The fields are those of `Preset`."""

    description: str
    moe: Callable[[Mapping[str, Any]], Tree] | None
    reference: str | None
    match: MatchSpec | None = None

    def preset_at(self, size: SizeName) -> Preset:
        trunk, train, seq_len = SIZES[size].trunk, SIZES[size].train, SIZES[size].seq_len
        return Preset(self.description, trunk, self.moe, self.reference, train, seq_len, self.match)


FAMILIES: dict[str, Family] = {
    "dense": Family("no experts", None, None),
    "smoe": Family("plain sparse mixture of 8 experts, top 1", _smoe, "dense"),
    "fine_grained": Family("twice the experts at half the width, top 2", _fine_grained, "smoe"),
    "xmoe": Family("smoe with X-MoE's published router", _xmoe, "smoe"),
    "mhmoe": Family("multi-head, matched to smoe", _mhmoe, "smoe", MatchSpec(to="smoe", by="both")),
    "deepseek": Family("DeepSeekMoE: fine-grained experts and a shared one", _deepseek, "smoe"),
}
