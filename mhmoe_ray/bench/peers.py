"""Expert layers of other packages, with the very weights of our plain layer, so that routing and work are the same.

transformers' Mixtral block and DeepSpeed's layer divide the k routing weights by their sum, as `normalize_gates` does.
"""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import nn

from mhmoe_ray.bench.layers import Absent, Layer, Shape, mixture
from mhmoe_ray.model.feedforward import FeedForward
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.spec import ModelSpec


class Peer(NamedTuple):
    name: str
    package: str
    oldest: tuple[int, ...]
    like: Callable[[MultiHeadMoE], nn.Module]
    """Function that returns the package's layer with the weights of ours."""
    capacity_factor: float | None = None


def mixtral(implementation: str, ours: MultiHeadMoE) -> nn.Module:
    """Return transformers' Mixtral block with our weights.

    Args:
        implementation: the implementation of its experts, which is a loop (`eager`) or `grouped_mm`.
        ours: the layer whose weights it gets.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    gate_EFD, up_EFD, down_EDF = _weights(ours)
    experts, d_expert, d_model = gate_EFD.shape
    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=d_expert,
        num_local_experts=experts,
        num_experts_per_tok=ours.router.moe.top_k,
        experts_implementation=implementation,
    )
    block: nn.Module = MixtralSparseMoeBlock(config)
    given = {
        "gate.weight": _router(ours),
        "experts.gate_up_proj": torch.cat([gate_EFD, up_EFD], dim=1),
        "experts.down_proj": down_EDF,
    }
    block.load_state_dict(given)
    return block


def deepspeed_moe(drop_tokens: bool, ours: MultiHeadMoE) -> nn.Module:
    """Return DeepSpeed's layer with our weights, on one rank, which needs no process group.

    The random parts of its routing are switched off.

    Args:
        drop_tokens: whether experts have a capacity of k N / E rows; otherwise as many as the fullest expert gets.
        ours: the layer whose weights it gets.
    """
    with redirect_stdout(sys.stderr):  # where its log goes from then on
        from deepspeed.moe.layer import MoE
    gate_EFD, up_EFD, down_EDF = _weights(ours)
    experts, d_expert, d_model = gate_EFD.shape
    one = FeedForward(ModelSpec(vocab_size=1, d_model=d_model, layers=1, attention_heads=1, d_ff=d_expert), d_expert)
    layer: nn.Module = MoE(
        d_model,
        one,
        num_experts=experts,
        k=ours.router.moe.top_k,
        drop_tokens=drop_tokens,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    given = {"deepspeed_moe.gate.wg.weight": _router(ours)}
    for e in range(experts):
        its = f"deepspeed_moe.experts.deepspeed_experts.{e}"
        given |= {f"{its}.gate_FD": gate_EFD[e], f"{its}.up_FD": up_EFD[e], f"{its}.down_DF": down_EDF[e]}
    layer.load_state_dict(given)
    return layer


PEERS = (
    Peer("transformers eager", "transformers", (5, 20), partial(mixtral, "eager")),
    Peer("transformers grouped_mm", "transformers", (5, 20), partial(mixtral, "grouped_mm")),
    # Before 0.19.4 its rows went through static routing's masks.
    Peer("DeepSpeed capacity", "deepspeed", (0, 19, 4), partial(deepspeed_moe, True), capacity_factor=1.0),
    Peer("DeepSpeed dropless", "deepspeed", (0, 19, 4), partial(deepspeed_moe, False)),
)


def peer_layers(shape: Shape) -> tuple[list[Layer], list[Absent]]:
    """Return the layers of installed packages, and the others with the reason why they are not measured."""
    layers, absent = [], []
    for peer in PEERS:
        version = installed(peer.package)
        if why := why_not(peer, version):
            absent.append(Absent(peer.name, why))
        else:
            moe = shape.plain.model_copy(
                update={"normalize_gates": shape.top_k > 1, "capacity_factor": peer.capacity_factor}
            )
            layers.append(Layer(peer.name, moe, partial(_build, peer, shape), f"{peer.package} {version}"))
    return layers, absent


def _build(peer: Peer, shape: Shape) -> nn.Module:
    return peer.like(mixture(shape, shape.plain))


def why_not(peer: Peer, version: str | None) -> str | None:
    """Return why a version of a package is not measured; None if it is.

    Args:
        peer: the layer of the package.
        version: the installed version; None if the package is not installed.
    """
    oldest = ".".join(map(str, peer.oldest))
    install = f"pip install '{peer.package}>={oldest}'"
    if version is None:
        return f"{peer.package} is not installed: {install}"
    if _numbers(version) < peer.oldest:
        return f"{peer.package} {version} is older than {oldest}: {install}"
    return None


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    release = version.partition("+")[0].split(".")
    return tuple(int(part) for part in release if part.isdecimal())


def _weights(ours: MultiHeadMoE) -> tuple[Any, Any, Any]:
    gate_EFD, up_EFD, down_EDF = (p.detach() for p in ours.experts.parameters())
    return gate_EFD, up_EFD, down_EDF


def _router(ours: MultiHeadMoE) -> torch.Tensor:
    [weight_ED] = ours.router.parameters()
    return weight_ED.detach()
