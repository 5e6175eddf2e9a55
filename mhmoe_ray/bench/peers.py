"""Expert layers of other packages, with the weights of our plain layer, so that routing and work are the same.

All of them divide the k gates of a token by their sum, as `normalize_gates` in our specs does.
"""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhmoe_ray.bench.layers import Layer, LayerShape, SkippedCase, build_mixture
from mhmoe_ray.model.feedforward import FeedForward
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.spec import ModelSpec


class Peer(NamedTuple):
    """Expert layer of another package, and the conditions under which it can be measured."""

    name: str
    package: str
    oldest_version: tuple[int, ...]
    build: Callable[[MultiHeadMoE], nn.Module]
    """Function that returns the package's layer with the weights of ours."""
    capacity_factor: float | None = None
    """Capacity factor of its routing; None if it drops no rows."""
    needs_cuda: bool = False
    source: str | None = None
    """Argument of `pip install`, if the package is not in the package index."""

    @property
    def install(self) -> str:
        """Command that installs the package."""
        return f"pip install '{self.source or f'{self.package}>={_join(self.oldest_version)}'}'"


def build_mixtral(implementation: str, our_layer: MultiHeadMoE) -> nn.Module:
    """Return transformers' Mixtral block with our weights; its experts run in a loop (`eager`) or as `grouped_mm`."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    gate_EFD, up_EFD, down_EDF = _weights(our_layer)
    experts, d_expert, d_model = gate_EFD.shape
    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=d_expert,
        num_local_experts=experts,
        num_experts_per_tok=our_layer.router.moe.top_k,
        experts_implementation=implementation,
    )
    block: nn.Module = MixtralSparseMoeBlock(config)
    state = {
        "gate.weight": _router_weight(our_layer),
        "experts.gate_up_proj": torch.cat([gate_EFD, up_EFD], dim=1),
        "experts.down_proj": down_EDF,
    }
    block.load_state_dict(state)
    return block


def build_deepspeed(drop_tokens: bool, our_layer: MultiHeadMoE) -> nn.Module:
    """Return DeepSpeed's layer with our weights, on one rank, without a process group and without random routing.

    With `drop_tokens`, an expert has a capacity of k N / E rows, otherwise of the number of rows of the fullest expert.
    """
    # DeepSpeed's logger keeps writing to the stream that was stdout when DeepSpeed was imported. The import therefore
    # sees stderr as stdout, because our stdout is only for results.
    with redirect_stdout(sys.stderr):
        from deepspeed.moe.layer import MoE
    gate_EFD, up_EFD, down_EDF = _weights(our_layer)
    experts, d_expert, d_model = gate_EFD.shape
    expert = FeedForward(ModelSpec(vocab_size=1, d_model=d_model, layers=1, attention_heads=1, d_ff=d_expert), d_expert)
    # DeepSpeed makes a copy of the module `expert` for each expert. The state dict below overwrites the weights of
    # these copies.
    layer: nn.Module = MoE(
        d_model,
        expert,
        num_experts=experts,
        k=our_layer.router.moe.top_k,
        drop_tokens=drop_tokens,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    state = {"deepspeed_moe.gate.wg.weight": _router_weight(our_layer)}
    for e in range(experts):
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{e}"
        state |= {f"{prefix}.gate_FD": gate_EFD[e], f"{prefix}.up_FD": up_EFD[e], f"{prefix}.down_DF": down_EDF[e]}
    layer.load_state_dict(state)
    return layer


def build_sonicmoe(our_layer: MultiHeadMoE) -> nn.Module:
    """Return SonicMoE's layer with our weights. It needs a GPU of compute capability 9.0 or more."""
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    gate_EFD, up_EFD, down_EDF = _weights(our_layer)
    experts, d_expert, d_model = gate_EFD.shape
    layer: nn.Module = MoE(
        num_experts=experts,
        num_experts_per_tok=our_layer.router.moe.top_k,
        hidden_size=d_model,
        intermediate_size=d_expert,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=1.0,
    )
    state = {
        "router.weight": _router_weight(our_layer),
        # SonicMoE expects the rows of the gate projection and of the up projection in alternation.
        "c_fc.weight": torch.stack([gate_EFD, up_EFD], dim=2).flatten(1, 2),
        "c_proj.weight": down_EDF,
    }
    layer.load_state_dict(state)
    return layer


class ScatterMoELayer(nn.Module):
    """Mixture of experts with a linear router and the experts of ScatterMoE, with our weights."""

    def __init__(self, our_layer: MultiHeadMoE) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__()
        gate_EFD, up_EFD, down_EDF = _weights(our_layer)
        experts, d_expert, d_model = gate_EFD.shape
        self.top_k = our_layer.router.moe.top_k
        self.router = nn.Linear(d_model, experts, bias=False)
        self.experts: nn.Module = GLUMLP(d_model, d_expert, experts, self.top_k)
        state = {
            "router.weight": _router_weight(our_layer),
            # The second half of the rows passes through the activation, so the gate projection is put there.
            "experts.experts.weight": torch.cat([up_EFD, gate_EFD], dim=1),
            "experts.output_experts.weight": down_EDF,
        }
        self.load_state_dict(state)

    def forward(self, x_BTM: Tensor) -> Tensor:
        # Autocast does not reach ScatterMoE's own functions, so the types are converted here.
        x_ND = x_BTM.flatten(0, 1).to(self.router.weight.dtype)
        gate_NK, expert_NK = self.router(x_ND).float().softmax(-1).topk(self.top_k)
        gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        y_ND: Tensor = self.experts(x_ND, gate_NK.to(x_ND.dtype), expert_NK)
        return y_ND.view_as(x_BTM)


class TorchLayer(nn.Module):
    """Mixture of experts of torch's own operators, compiled as a whole, with our weights.

    Like the layer of torchtitan, it sorts routes by expert, computes their experts by grouped products, and adds the
    weighted outputs to the rows that they came from. The host does not wait for the device.
    """

    def __init__(self, our_layer: MultiHeadMoE) -> None:
        super().__init__()
        gate_EFD, up_EFD, down_EDF = _weights(our_layer)
        self.top_k = our_layer.router.moe.top_k
        self.router_ED = nn.Parameter(_router_weight(our_layer).clone())
        self.gate_up_EGD = nn.Parameter(torch.cat([gate_EFD, up_EFD], dim=1))
        self.down_EDF = nn.Parameter(down_EDF.clone())
        # Layers of several sizes share the code of `forward`. Beyond this number of sizes, torch would not compile it.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.compile(dynamic=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        grouped_product = torch.nn.functional.grouped_mm
        x_ND = x_BTM.flatten(0, 1)
        gate_NK, expert_NK = (x_ND @ self.router_ED.T).float().softmax(-1).topk(self.top_k)
        gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        expert_R, route_R = expert_NK.flatten().sort(stable=True)
        id_E = torch.arange(len(self.down_EDF), device=x_ND.device)
        end_E = torch.searchsorted(expert_R, id_E, right=True, out_int32=True)
        row_R = route_R // self.top_k
        gate_RF, up_RF = grouped_product(x_ND[row_R], self.gate_up_EGD.mT, offs=end_E).chunk(2, dim=-1)
        out_RD = grouped_product(nn.functional.silu(gate_RF) * up_RF, self.down_EDF.mT, offs=end_E)
        weighted_RD = out_RD * gate_NK.flatten()[route_R, None].to(out_RD.dtype)
        return torch.zeros_like(x_ND).index_add(0, row_R, weighted_RD).view_as(x_BTM)


PEERS = (
    Peer("transformers eager", "transformers", (5, 16), partial(build_mixtral, "eager")),
    Peer("transformers grouped_mm", "transformers", (5, 16), partial(build_mixtral, "grouped_mm")),
    Peer("torch compiled", "torch", (2, 11), TorchLayer),
    # Versions of DeepSpeed before 0.19.4 are not measured, because they sent rows to experts with the large masks of
    # static routing.
    Peer("DeepSpeed capacity", "deepspeed", (0, 19, 4), partial(build_deepspeed, True), capacity_factor=1.0),
    Peer("DeepSpeed dropless", "deepspeed", (0, 19, 4), partial(build_deepspeed, False)),
    Peer("SonicMoE", "sonic-moe", (0, 1, 2), build_sonicmoe, needs_cuda=True),
    Peer(
        "ScatterMoE",
        "scattermoe",
        (0, 3),
        ScatterMoELayer,
        needs_cuda=True,
        source="git+https://github.com/shawntan/scattermoe",
    ),
)


def peer_layers(shape: LayerShape, device: torch.device) -> tuple[list[Layer], list[SkippedCase]]:
    """Return the layers of other packages that can be measured on a device, and the others with the reason."""
    layers, skipped = [], []
    for peer in PEERS:
        version = installed_version(peer.package)
        if reason := unavailable_reason(peer, version, device):
            skipped.append(SkippedCase(peer.name, reason))
        else:
            moe = shape.plain_moe.model_copy(
                update={"normalize_gates": shape.top_k > 1, "capacity_factor": peer.capacity_factor}
            )
            layers.append(Layer(peer.name, moe, partial(_build, peer, shape), f"{peer.package} {version}"))
    return layers, skipped


def _build(peer: Peer, shape: LayerShape) -> nn.Module:
    return peer.build(build_mixture(shape.d_model, shape.plain_moe))


def unavailable_reason(peer: Peer, version: str | None, device: torch.device) -> str | None:
    """Return the reason in one line why a layer of another package cannot be measured; None if it can be measured.

    `version` is the installed one, or None.
    """
    if peer.needs_cuda and device.type != "cuda":
        return f"{peer.package} runs on NVIDIA's GPUs only"
    if version is None:
        return f"{peer.package} is not installed: {peer.install}"
    if _version_numbers(version) < peer.oldest_version:
        return f"{peer.package} {version} is older than {_join(peer.oldest_version)}: {peer.install}"
    return None


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _join(version_numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, version_numbers))


def _version_numbers(version: str) -> tuple[int, ...]:
    # The local part, such as +cpu, and parts such as dev1 are left out, because they do not change the order of
    # versions here.
    release = version.partition("+")[0].split(".")
    return tuple(int(part) for part in release if part.isdecimal())


def _weights(our_layer: MultiHeadMoE) -> tuple[Any, Any, Any]:
    gate_EFD, up_EFD, down_EDF = (p.detach() for p in our_layer.experts.parameters())
    return gate_EFD, up_EFD, down_EDF


def _router_weight(our_layer: MultiHeadMoE) -> Tensor:
    [weight_ED] = our_layer.router.parameters()
    return weight_ED.detach()
