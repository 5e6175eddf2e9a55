"""The papers' models by name, with the settings of their runs.

P1 is arXiv 2404.15045, P2 arXiv 2411.16205; `rebuttal` models are those of P1's public review. Where P1's paper and
code disagree, the settings are those of the code and its logs: static capacity, the random second expert, normalized
gates, torchscale's router, dropout. The description of a preset states what its source leaves open. Presets whose names
end with `-dropless` or `-raw` differ from these settings, so that models of several top-k have one routing and one kind
of gates.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.presets import Preset, Tree, checkpoint_intervals, constant_moe
from mhmoe_ray.planner.sizes import dense_width

P1_EXPERTS = (8, 16, 32, 64, 128, 256)
P1_HEADS = (2, 4, 6, 8, 12)
P1_FITTED_WIDTHS = {8: 11_466, 16: 11_574, 32: 12_085, 64: 12_092, 128: 12_193, 256: 12_162}
"""Expert width of P1's models with h = 4 heads, by the number of experts. It fits the numbers of parameters in P1's
table 11, which has no widths."""

_P1_TRUNK = {
    "backbone": "subln",
    "vocab_size": 100_287,
    "d_model": 768,
    "layers": 12,
    "attention_heads": 12,
    "d_ff": 3072,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
_P1_TRAIN = {
    "steps": 300_000,
    "micro_batches": 256,
    "micro_batch_size": 1,
    "precision": "bfloat16",
    "lr": 6e-4,
    "min_lr": 0.0,
    "warmup_steps": 375,
    "weight_decay": 0.01,
    "betas": (0.9, 0.98),
    "eps": 1e-6,
    "clip_norm": 2.0,
    **checkpoint_intervals(300_000),
}
# BEiT-3 base with an output for BEiT v2's codebook. It has 277 million parameters, as the dense model in table 11 of
# paper P1 (arXiv 2404.15045). P1's release has no code for its multimodal models. That experts lie beside the
# feed-forward layers of every second block is inferred: X-MoE with E experts then has 276 + 28.4 E million parameters,
# and 276 + 29.75 E in the table.
_P1_ENCODER_TRUNK: Tree = {
    "backbone": "subln",
    "encoder": {
        "image_size": 224,
        "patch_size": 16,
        "image_positions": 199,
        "text_positions": 1024,
        "image_targets": "codebook",
        "codebook_size": 8192,
    },
    "vocab_size": 64_010,
    "d_model": 768,
    "layers": 12,
    "attention_heads": 12,
    "d_ff": 3072,
    "tied_embeddings": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
# Paper P1 (arXiv 2404.15045) states the batch of 512 samples, but not the number of steps, which is that of BEiT-3.
_P1_ENCODER_TRAIN: Tree = {
    "steps": 1_000_000,
    "micro_batches": 16,
    "micro_batch_size": 32,
    "precision": "bfloat16",
    "schedule": "cosine",
    "lr": 2.8e-3,
    "min_lr": 0.0,
    "warmup_steps": 10_000,
    "weight_decay": 0.05,
    "betas": (0.9, 0.98),
    "eps": 1e-6,
    "clip_norm": 2.0,
    **checkpoint_intervals(1_000_000),
}
ENCODER_SEQ_LEN = 128
"""Number of tokens of a text, with its start token, in multimodal runs of arXiv 2404.15045, which does not state it."""
# The dense and X-MoE models of paper P1 (arXiv 2404.15045) have micro-batches of two sequences. The size matters,
# because expert capacity is per micro-batch.
_TWO_SEQUENCES = {"micro_batches": 128, "micro_batch_size": 2}
_P2_TRUNK = {
    "backbone": "llama",
    "vocab_size": 32_000,
    "d_model": 768,
    "layers": 12,
    "attention_heads": 12,
    "d_ff": 2048,
}
_P2_TRAIN = {
    **_P1_TRAIN,
    "steps": 100_000,
    "min_lr": 3e-5,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    **checkpoint_intervals(100_000),
}
_MIXTRAL_TRUNK = {
    "backbone": "llama",
    "vocab_size": 32_000,
    "d_model": 4096,
    "layers": 32,
    "attention_heads": 32,
    "kv_heads": 8,
    "tied_embeddings": False,
    "rope_theta": 1e6,
}
SEQ_LEN = 2048
_STATIC: Tree = {
    "router": "xmoe_torchscale",
    "top_k": 2,
    "normalize_gates": True,
    "capacity_factor": 1.0,
    "second_expert": "random",
}
"""Routing keys of P1's `moe` section, as its code has them. The gate of torchscale has no third choice."""


def _dropless(top_k: int, normalize_gates: bool = True) -> Tree:
    return {"router": "xmoe_torchscale", "top_k": top_k, "normalize_gates": normalize_gates}


@cache
def paper_presets() -> Mapping[str, Preset]:
    """Return the presets of all models of the papers, by name, such as `p1-mhmoe-8-h4`."""
    return dict([*_first_paper(), *_first_paper_encoders(), *_rebuttal(), *_follow_up(), *_mixtral()])


def _first_paper() -> Iterator[tuple[str, Preset]]:
    """Yield P1's decoders: the dense model, X-MoE and MH-MoE."""
    train = {**_P1_TRAIN, **_TWO_SEQUENCES}
    yield "p1-dense", Preset("P1, the dense model", _P1_TRUNK, None, None, train, SEQ_LEN)
    variants = [
        ("", _STATIC, "P1"),
        ("-dropless", _dropless(2), "after P1, dropless"),
        *((f"-k{k}", _dropless(k), "after P1, not published at this depth, dropless") for k in (3, 4)),
    ]
    for experts in P1_EXPERTS:
        for suffix, routing, origin in variants:
            xmoe, top_k = f"p1-xmoe-{experts}{suffix}", routing["top_k"]
            description = f"{origin}: X-MoE with {experts} experts, top {top_k}"
            yield xmoe, Preset(description, _P1_TRUNK, _p1_moe(1, experts, routing), "p1-dense", train, SEQ_LEN)
            for heads in P1_HEADS:
                width_source = "fitted to table 11" if heads == 4 else "by equal parameters"
                description = f"{origin}: MH-MoE with {experts} experts, h {heads}, top {top_k}; widths {width_source}"
                moe = _p1_moe(heads, experts, routing)
                yield (
                    f"p1-mhmoe-{experts}-h{heads}{suffix}",
                    Preset(description, _P1_TRUNK, moe, xmoe, _P1_TRAIN, SEQ_LEN),
                )


def _first_paper_encoders() -> Iterator[tuple[str, Preset]]:
    dense, trunk, train = "p1-multimodal-dense", _P1_ENCODER_TRUNK, _P1_ENCODER_TRAIN
    yield dense, Preset("P1, BEiT-3 base", trunk, None, None, train, ENCODER_SEQ_LEN)
    for experts in (8, 32):
        xmoe = f"p1-multimodal-xmoe-{experts}"
        position = "experts beside the feed-forward layers of every second block, which is inferred"
        description = f"P1, BEiT-3 base: X-MoE with {experts} experts; {position}"
        yield xmoe, Preset(description, trunk, _p1_moe(1, experts, _STATIC), dense, train, ENCODER_SEQ_LEN)
        description = f"P1, BEiT-3 base: MH-MoE with {experts} experts, h 4; widths by equal parameters"
        moe = _p1_moe(4, experts, _STATIC)
        yield f"p1-multimodal-mhmoe-{experts}-h4", Preset(description, trunk, moe, xmoe, train, ENCODER_SEQ_LEN)


def _p1_moe(heads: int, experts: int, routing: Tree) -> Callable[[Mapping[str, Any]], Tree]:
    """Return a function of a trunk that returns P1's `moe` section; a width that is not a number is a SpecError.

    With one head, an expert is as wide as a dense layer; with several, its layer has as many parameters as with one
    (`equal_parameter_width`). Models with 4 heads on the trunk of P1's decoders have `P1_FITTED_WIDTHS` instead.
    """

    def build_section(trunk: Mapping[str, Any]) -> Tree:
        d_model, hidden = trunk.get("d_model"), dense_width(trunk)
        width = hidden
        if not isinstance(d_model, int):
            remedy = "give it a number"
            raise SpecError("model.d_model", f"widths of experts follow from it, and it is {d_model!r}", remedy)
        is_decoder = trunk.get("encoder") is None
        if heads == 4 and is_decoder and (d_model, hidden) == (_P1_TRUNK["d_model"], _P1_TRUNK["d_ff"]):
            width = P1_FITTED_WIDTHS[experts]
        elif heads > 1:
            width = equal_parameter_width(heads, experts, d_model, hidden)
        return {"heads": heads, "experts": experts, "d_expert": width, **routing}

    return build_section


def equal_parameter_width(heads: int, experts: int, d: int, hidden: int) -> int:
    """Return the largest expert width at which P1's MH-MoE layer has no more parameters than its X-MoE layer.

    The formula is that of P1's appendix D, with the biases and norms of P1's code added. Routers do not count. `hidden`
    is the width of an expert of X-MoE.
    """
    xmoe = experts * ((2 * d + 3) * hidden + d)
    projections = 2 * (d * d + d)
    return ((xmoe - projections) // experts - d // heads) // (2 * d // heads + 3)


def _rebuttal() -> Iterator[tuple[str, Preset]]:
    """Yield the models of P1's public review."""
    six_layers = {**_P1_TRUNK, "layers": 6}
    train = {**_P1_TRAIN, "steps": 25_000, **checkpoint_intervals(25_000)}
    for top_k in (3, 4):
        open_question = "their number (here 8) and the routing (here dropless) are not stated"
        xmoe = f"rebuttal-xmoe-k{top_k}"
        description = f"review of P1, 6 layers, X-MoE, top {top_k} experts; {open_question}"
        yield xmoe, Preset(description, six_layers, _p1_moe(1, 8, _dropless(top_k)), None, train, SEQ_LEN)
        description = f"review of P1, 6 layers, MH-MoE h 2, top {top_k} experts; {open_question}"
        moe = _p1_moe(2, 8, _dropless(top_k))
        yield f"rebuttal-mhmoe-k{top_k}", Preset(description, six_layers, moe, xmoe, train, SEQ_LEN)
    three_layers = {**_P1_TRUNK, "layers": 3}
    train = {**_P1_TRAIN, "steps": 20_000, **checkpoint_intervals(20_000)}
    # With a single choice, a normalized gate would always be 1, and the router would learn nothing from the loss.
    variants = [
        ("128-k1", 128, _dropless(1, normalize_gates=False), "dropless with raw gates"),
        ("256-k2", 256, _STATIC, "static with normalized gates"),
        ("256-k2-raw", 256, _dropless(2, normalize_gates=False), "dropless with raw gates, as with 128 experts"),
    ]
    for suffix, experts, routing, routing_text in variants:
        description = f"review of P1, 3 layers, {experts} experts, top {routing['top_k']}; widths and routing are not "
        description += f"stated, here P1's widths, {routing_text}"
        reference = None if suffix == "128-k1" else "rebuttal-smoe-128-k1"
        moe = _p1_moe(1, experts, routing)
        yield f"rebuttal-smoe-{suffix}", Preset(description, three_layers, moe, reference, train, SEQ_LEN)


def _follow_up() -> Iterator[tuple[str, Preset]]:
    """Yield P2's models, those with experts once without and once with a shared expert."""
    yield "p2-dense", Preset("P2, the dense model", _P2_TRUNK, None, None, _P2_TRAIN, SEQ_LEN)
    variants: list[tuple[str, str, dict[str, int], int]] = [
        ("smoe", "SMoE", {"heads": 1, "top_k": 1, "experts": 8}, 8),
        ("fine-grained", "fine-grained SMoE", {"heads": 1, "top_k": 2, "experts": 16}, 4),
        ("mhmoe-h2", "MH-MoE h 2", {"heads": 2, "top_k": 2, "experts": 40}, 3),
        ("mhmoe-h3", "MH-MoE h 3", {"heads": 3, "top_k": 3, "experts": 96}, 2),
    ]
    for suffix, has_shared in [("", False), ("-shared", True)]:
        for name, title, shape, eighths in variants:
            description = f"P2, {title}" + (" with a shared expert" if has_shared else "")
            reference = "p2-dense" if name == "smoe" else f"p2-smoe{suffix}"
            moe = _p2_moe(shape, eighths, has_shared)
            yield f"p2-{name}{suffix}", Preset(description, _P2_TRUNK, moe, reference, _P2_TRAIN, SEQ_LEN)


def _p2_moe(shape: Tree, eighths: int, has_shared: bool) -> Callable[[Mapping[str, Any]], Tree]:
    """Return a function of a trunk that returns P2's `moe` section; `eighths` of a dense width are the expert width."""

    def build_section(trunk: Mapping[str, Any]) -> Tree:
        width = dense_width(trunk)
        return {**shape, "d_expert": width * eighths // 8, "d_shared": width if has_shared else 0}

    return build_section


def _mixtral() -> Iterator[tuple[str, Preset]]:
    # The public review of paper P1 (arXiv 2404.15045) measured serving of MH-MoE in Mixtral. It states neither the
    # width nor the number of experts, so both are Mixtral's.
    shape: dict[str, Any] = {"experts": 8, "top_k": 2, "d_expert": 14_336, "every": 1, "normalize_gates": True}
    # Mixtral's coefficient of the load balancing loss is 0.02. With uniform routing, Mixtral's loss is k = 2 and is
    # averaged over 32 layers, while ours is 1 and is summed over layers. The factor 2 / 32 makes both equal.
    loss: dict[str, Any] = {"balance_weight": 0.02 * 2 / 32, "balance_choices": "all"}
    for heads in (1, 2, 4):
        description = (
            "Mixtral 8x7B" if heads == 1 else f"Mixtral 8x7B with h {heads}; widths are not stated, here the same"
        )
        name, reference = ("mixtral-8x7b", None) if heads == 1 else (f"mixtral-8x7b-h{heads}", "mixtral-8x7b")
        moe = constant_moe(heads=heads, **shape, **loss)
        yield name, Preset(f"{description}; its training is not published", _MIXTRAL_TRUNK, moe, reference, {}, SEQ_LEN)
