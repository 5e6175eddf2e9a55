"""Time and memory of expert layers of equal work, with each of our kernels, beside layers of other packages."""

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from mhmoe_kernels import unavailable_reason
from mhmoe_kernels.choice import ExpertSizes
from mhmoe_ray.bench.acceptance.settings import LayerSize, PartCase, Rows, Settings, first_line
from mhmoe_ray.bench.layers import Shape
from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.bench.peers import peer_layers
from mhmoe_ray.bench.timing import device_clock, measure_rounds
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.spec import ModelSpec

KERNELS = ("grouped_gemm", "grouped_mm", "triton", "grouped")


def make_spec(settings: Settings, size: LayerSize, kernel: str, capacity_factor: float | None = None) -> ModelSpec:
    """Return the spec of a model with a single expert layer; a capacity factor gives it static routing."""
    moe = {
        "heads": size.heads,
        "experts": size.experts,
        "top_k": size.top_k,
        "d_expert": size.hidden,
        "every": 1,
        "kernel": kernel,
        "capacity_factor": capacity_factor,
    }
    return ModelSpec.model_validate(
        {"vocab_size": 1, "d_model": settings.layer_width, "layers": 1, "attention_heads": 1, "moe": moe}
    )


def make_layer(settings: Settings, size: LayerSize, kernel: str, capacity_factor: float | None = None) -> MultiHeadMoE:
    """Return an expert layer on the device, with initial weights in float32."""
    model = Decoder(make_spec(settings, size, kernel, capacity_factor))
    init_weights(model, 0)
    [layer] = model.moe_layers()
    assert isinstance(layer, MultiHeadMoE)
    return layer.to(settings.torch_device)


def make_tokens(settings: Settings, tokens: int) -> Tensor:
    """Return random token vectors in bfloat16 that require a gradient, shape (1, tokens, width)."""
    x_BTM = torch.randn(1, tokens, settings.layer_width, generator=torch.Generator().manual_seed(0))
    return x_BTM.to(settings.torch_device, torch.bfloat16).requires_grad_()


def kernels_of(settings: Settings, size: LayerSize) -> list[str]:
    """Return the names of the kernels that can compute a layer of this size on the device."""
    sizes = ExpertSizes("swiglu", "bfloat16", settings.layer_width // size.heads, size.hidden, size.experts)
    return [kernel for kernel in KERNELS if unavailable_reason(kernel, settings.torch_device, sizes) is None]


def layer_flops(settings: Settings, size: LayerSize, tokens: int) -> int:
    """Return the FLOPs of all matrix products in a forward and backward pass of a layer."""
    width = settings.layer_width // size.heads
    experts = tokens * size.heads * size.top_k * 3 * width * size.hidden
    projections = 2 * tokens * settings.layer_width**2 if size.heads > 1 else 0
    router = tokens * size.heads * width * size.experts
    # The backward pass has two products of the same size for each product here. A multiply-add is two FLOPs.
    return 3 * 2 * (experts + projections + router)


class _Case:
    def __init__(self, settings: Settings, module: torch.nn.Module, tokens: int) -> None:
        self.module, self.x_BTM, self._device = module, make_tokens(settings, tokens), settings.torch_device

    def run(self) -> tuple[float, float]:
        """Run a forward and a backward pass, and return the seconds of each."""
        read_clock = device_clock(self._device)
        start = read_clock()
        with torch.autocast(self._device.type, torch.bfloat16):
            output = self.module(self.x_BTM)
        y_BTM = output[0] if isinstance(output, tuple) else output
        middle = read_clock()
        torch.autograd.backward(y_BTM, torch.ones_like(y_BTM))
        end = read_clock()
        for leaf in (self.x_BTM, *self.module.parameters()):
            leaf.grad = None
        return middle - start, end - middle


def name_suffix(settings: Settings, tokens: int) -> str:
    """Return the end of the names of results for a number of tokens; the last number has none."""
    return "" if tokens == settings.layer_tokens[-1] else f" at {tokens} tokens"


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each number of tokens: the time and memory of each layer with each kernel, and ratios of times.

    All layers of a case are timed in turn. Both layers of a ratio have kernel `auto`.
    """
    for tokens in settings.layer_tokens:
        yield PartCase(f"{tokens} tokens", partial(_measure, settings, tokens))


def _measure(settings: Settings, tokens: int) -> Rows:
    modules: dict[str, torch.nn.Module] = {}
    flops: dict[str, int] = {}
    for name, size in settings.layers.items():
        for kernel in ("auto", *kernels_of(settings, size)):
            title = name if kernel == "auto" else f"{name}, {kernel}"
            # The other packages' layers have weights in bfloat16, too, so no layer casts weights or gradients.
            modules[title] = make_layer(settings, size, kernel).to(torch.bfloat16)
            flops[title] = layer_flops(settings, size, tokens)
        modules[f"{name}, static"] = make_layer(settings, size, "auto", capacity_factor=1.25).to(torch.bfloat16)
        flops[f"{name}, static"] = flops[name]
    if not settings.is_toy:
        plain = settings.layers["SMoE"]
        shape = Shape(tokens, settings.layer_width, plain.experts, plain.top_k, plain.hidden)
        peers, skipped = peer_layers(shape, settings.torch_device)
        for peer in peers:
            if "eager" not in peer.name:
                modules[peer.name] = peer.build().to(settings.torch_device, torch.bfloat16)
                flops[peer.name] = flops["SMoE"]
        for peer_case in skipped:
            yield {"name": f"{peer_case.name}, {tokens} tokens", "skipped": peer_case.reason}
    cases, peaks = {}, {}
    for name, module in modules.items():
        case = _Case(settings, module, tokens)
        try:
            case.run()
            peaks[name] = peak_bytes(case.run, settings.torch_device)
        # Static routing and other packages may need more memory than the GPU has, which is no failure.
        except torch.OutOfMemoryError as error:
            yield {"name": f"{name}, {tokens} tokens", "skipped": first_line(error)}
            continue
        # One layer that fails must not hide the measurements of the others.
        except Exception as error:
            if settings.device == "cuda":
                torch.cuda.synchronize()
            yield {"name": f"{name}, {tokens} tokens", "passed": False, "error": first_line(error)}
            continue
        cases[name] = case
    seconds = measure_rounds(cases, settings.rounds, lambda name, _: cases[name].run())
    forward_medians = {name: median(forward for forward, _ in passes) for name, passes in seconds.items()}
    medians = {
        name: forward_medians[name] + median(backward for _, backward in passes) for name, passes in seconds.items()
    }
    suffix = name_suffix(settings, tokens)
    for name in cases:
        yield {
            "name": f"{name}{suffix}",
            "ms": medians[name] * 1e3,
            "forward_ms": forward_medians[name] * 1e3,
            "TFLOP/s": flops[name] / medians[name] / 1e12,
            "peak_gb": peaks[name] / 1e9,
        }
    for name in settings.layers:
        if name != "SMoE" and name in medians and "SMoE" in medians:
            yield {"name": f"{name} to SMoE{suffix}", "times": medians[name] / medians["SMoE"]}
