"""Layers to compare: a plain mixture of experts, others of equal work and parameters, and a dense layer of equal work.

Only the fine-grained layer has more parameters, twice as many: it has eight times the experts, each a quarter as wide,
and chooses four times as many.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mhmoe_kernels import unavailable_reason
from mhmoe_kernels.abilities import KERNELS
from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.autocast import DTYPES
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.planner.match import matched_heads
from mhmoe_ray.spec import ModelSpec, MoESpec
from mhmoe_ray.spec.base import Precision


class LayerShape(NamedTuple):
    """Sizes of the plain mixture of experts, from which those of all other layers follow."""

    tokens: int = 4096
    d_model: int = 512
    experts: int = 8
    top_k: int = 2
    d_expert: int = 2048

    @property
    def plain_moe(self) -> MoESpec:
        return MoESpec(heads=1, experts=self.experts, top_k=self.top_k, d_expert=self.d_expert, every=1)


class Layer(NamedTuple):
    """Description of a layer to measure."""

    name: str
    moe: MoESpec | None
    """Sizes of the mixture of experts; None for the dense layer."""
    build: Callable[[], nn.Module]
    """Function that returns the layer with its weights, in float32 on the CPU."""
    package: str | None = None
    """Package of the layer, with its version; None for ours."""


class SkippedCase(NamedTuple):
    """Layer or kernel that was requested but not measured, with the reason."""

    name: str
    reason: str

    def as_json(self) -> dict[str, str]:
        """Return the case as `mhmoe bench layer --json` prints it."""
        return {"name": self.name, "why": self.reason}


def has_masks(moe: MoESpec | None) -> bool:
    """Return whether a layer uses the masks of static routing, whose size grows with the square of its rows."""
    return moe is not None and moe.kernel == "capacity"


class LayerCase:
    """Layer with its weights and input on the device, for repeated passes."""

    def __init__(self, layer: Layer, shape: LayerShape, dtype: Precision, device: torch.device) -> None:
        self.layer = layer
        self.module = layer.build().to(device, DTYPES[dtype])
        # The seed is fixed, so that all layers get the same input.
        x_BTM = torch.randn(1, shape.tokens, shape.d_model, generator=torch.Generator().manual_seed(0))
        self.x_BTM = x_BTM.to(device, DTYPES[dtype]).requires_grad_()

    def forward(self) -> Tensor:
        """Return the output of the layer."""
        y = self.module(self.x_BTM)
        y_BTM: Tensor = y[0] if isinstance(y, tuple) else y  # the output comes before routing, loss or counts
        return y_BTM

    def backward(self, y_BTM: Tensor) -> None:
        """Compute the gradients of the input and of all weights from an output of `forward`, and drop them."""
        torch.autograd.backward(y_BTM, torch.ones_like(y_BTM))
        for leaf in (self.x_BTM, *self.module.parameters()):
            leaf.grad = None

    def run(self) -> Tensor:
        """Run a forward and backward pass, and return the output."""
        y_BTM = self.forward()
        self.backward(y_BTM)
        return y_BTM.detach()


def our_layers(
    shape: LayerShape,
    heads: Sequence[int],
    static: bool,
    kernels: Sequence[str],
    device: torch.device,
    dtype: Precision = "bfloat16",
) -> tuple[list[Layer], list[SkippedCase]]:
    """Return our layers to measure, with each kernel that can run, and the requested kernels that cannot.

    The dense layer comes first, then the plain one with the first kernel. `static` adds static routing with its masks,
    for the plain layer and for the one with the fewest heads. An impossible layer, a number of heads without a layer of
    equal work, an unknown kernel, and kernels of which none can run are SpecErrors.
    """
    plain_moe = shape.plain_moe
    moes: dict[str, MoESpec] = {"SMoE": plain_moe, "X-MoE": plain_moe.model_copy(update={"router": "xmoe"})}
    for h in heads:
        moe = matched_heads(single_layer_spec(shape.d_model, plain_moe), h, plain_moe.top_k).moe
        assert moe is not None
        moes[f"MH-MoE h {h}"] = moe
    fine_grained = {"experts": 8 * shape.experts, "top_k": 4 * shape.top_k, "d_expert": shape.d_expert // 4}
    moes["fine-grained"] = plain_moe.model_copy(update=fine_grained)
    runnable_kernels, skipped = _split_kernels(kernels, device, dtype)
    layer_moes: dict[str, MoESpec] = {}
    for name, moe in moes.items():
        for kernel in runnable_kernels:
            layer_moes[name if len(kernels) == 1 else f"{name}, {kernel}"] = moe.model_copy(update={"kernel": kernel})
    if static:
        # The masks of static routing grow with the square of the rows, and more heads mean more rows. Static routing is
        # therefore measured only for the plain layer and the smallest number of heads.
        for name in ["SMoE", *(f"MH-MoE h {h}" for h in sorted(heads)[:1])]:
            static_routing = {"capacity_factor": 1.0, "kernel": "capacity"}
            layer_moes[f"{name} static"] = moes[name].model_copy(update=static_routing)
    dense = dense_layer(shape)
    mixtures = [Layer(name, moe, partial(build_mixture, shape.d_model, moe)) for name, moe in layer_moes.items()]
    return [dense, *mixtures], skipped


def _split_kernels(
    kernels: Sequence[str], device: torch.device, dtype: Precision
) -> tuple[list[str], list[SkippedCase]]:
    runnable_kernels, skipped = [], []
    trainable_kernels = [name for name in KERNELS if name != "auto"]
    for kernel in kernels:
        if kernel not in ("auto", *trainable_kernels):
            raise SpecError(
                f"kernel {kernel}", "there is none of that name", f"choose one of auto, {', '.join(trainable_kernels)}"
            )
        if kernel == "capacity":
            raise SpecError("kernel capacity", "it is static routing, which drops rows", "ask for it with --static")
        precision = next(limits.precision for name, limits in KERNELS.items() if name == kernel)
        precision_reason = (
            f"kernel {kernel} computes in {precision}, not in {dtype}" if precision not in (None, dtype) else None
        )
        # If both the precision and the machine are unsupported, the reason is the precision, because another machine
        # would not help.
        reason = precision_reason or unavailable_reason(kernel, device)
        if reason is None:
            runnable_kernels.append(kernel)
        else:
            skipped.append(SkippedCase(f"kernel {kernel}", reason))
    if not runnable_kernels:
        raise SpecError(skipped[0].name, skipped[0].reason, "name one that can run here")
    return runnable_kernels, skipped


def single_layer_spec(d_model: int, moe: MoESpec) -> ModelSpec:
    """Return the spec of a model with a single expert layer; the rest of the model is as small as possible."""
    return ModelSpec(vocab_size=1, d_model=d_model, layers=1, attention_heads=1, moe=moe)


def build_mixture(d_model: int, moe: MoESpec) -> MultiHeadMoE:
    """Return a multi-head mixture of experts with initial weights."""
    model = Decoder(single_layer_spec(d_model, moe))
    init_weights(model, 0)
    [layer] = model.moe_layers()
    assert isinstance(layer, MultiHeadMoE)
    return layer


def dense_layer(shape: LayerShape) -> Layer:
    """Return a dense SwiGLU layer whose hidden layer is as wide as those of a token's k experts together."""
    return Layer("dense", None, partial(_build_dense, shape))


def _build_dense(shape: LayerShape) -> nn.Module:
    hidden_width = shape.top_k * shape.d_expert
    model = Decoder(ModelSpec(vocab_size=1, d_model=shape.d_model, layers=1, attention_heads=1, d_ff=hidden_width))
    init_weights(model, 0)
    return model.get_submodule("blocks.0.ffn")
