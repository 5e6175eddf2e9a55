"""Time and memory of expert layers of equal work, with each of our kernels, beside layers of other packages."""

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from mhmoe_kernels import unavailable_reason
from mhmoe_kernels.choice import ExpertSizes
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings, first_line
from mhmoe_ray.bench.layers import Layer, LayerCase, LayerShape, build_mixture, dense_layer
from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.bench.peers import peer_layers
from mhmoe_ray.bench.timing import device_clock, measure_rounds
from mhmoe_ray.spec import MoESpec

KERNELS = ("grouped_gemm", "grouped_mm", "triton", "grouped")


def with_kernel(moe: MoESpec, kernel: str) -> MoESpec:
    """Return the sizes of a layer that the given kernel computes."""
    return moe.model_copy(update={"kernel": kernel})


def make_tokens(settings: Settings, tokens: int) -> Tensor:
    """Return random token vectors in bfloat16 that require a gradient, shape (1, tokens, width)."""
    x_BTM = torch.randn(1, tokens, settings.layer_width, generator=torch.Generator().manual_seed(0))
    return x_BTM.to(settings.torch_device, torch.bfloat16).requires_grad_()


def expert_sizes(settings: Settings, moe: MoESpec) -> ExpertSizes:
    """Return the sizes by which kernels are chosen for a layer."""
    return ExpertSizes("swiglu", "bfloat16", settings.layer_width // moe.heads, moe.d_expert, moe.experts)


def kernels_of(settings: Settings, moe: MoESpec) -> list[str]:
    """Return the names of the kernels that can compute a layer of this size on the device."""
    sizes = expert_sizes(settings, moe)
    return [kernel for kernel in KERNELS if unavailable_reason(kernel, settings.torch_device, sizes) is None]


def layer_flops(settings: Settings, moe: MoESpec, tokens: int) -> int:
    """Return the FLOPs of all matrix products in a forward and backward pass of a layer."""
    width = settings.layer_width // moe.heads
    experts = tokens * moe.heads * moe.top_k * 3 * width * moe.d_expert
    projections = 2 * tokens * settings.layer_width**2 if moe.heads > 1 else 0
    router = tokens * moe.heads * width * moe.experts
    # The backward pass has two products of the same size for each product here. A multiply-add is two FLOPs.
    return 3 * 2 * (experts + projections + router)


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
    plain = settings.layers["SMoE"]
    shape = LayerShape(tokens, settings.layer_width, plain.experts, plain.top_k, plain.d_expert)
    layers = [dense_layer(shape)]
    # The dense layer has the multiply-adds of the plain one, but no router.
    flops = {"dense": 18 * tokens * shape.d_model * shape.top_k * shape.d_expert}
    for name, moe in settings.layers.items():
        moes = {name: moe}
        moes |= {f"{name}, {kernel}": with_kernel(moe, kernel) for kernel in kernels_of(settings, moe)}
        moes[f"{name}, static"] = moe.model_copy(update={"capacity_factor": 1.25})
        layers += [Layer(title, m, partial(build_mixture, shape.d_model, m)) for title, m in moes.items()]
        flops |= dict.fromkeys(moes, layer_flops(settings, moe, tokens))
    peers, skipped = peer_layers(shape, settings.torch_device)
    layers += [peer for peer in peers if "eager" not in peer.name]
    flops |= {peer.name: flops["SMoE"] for peer in peers}
    for peer_case in skipped:
        yield {"name": f"{peer_case.name}, {tokens} tokens", "skipped": peer_case.reason}
    cases, peaks = {}, {}
    for layer in layers:
        name = layer.name
        try:
            # The layers of other packages have weights in bfloat16, too, so no layer casts weights or gradients.
            case = LayerCase(layer, shape, "bfloat16", settings.torch_device)
            _time_pass(case)
            peaks[name] = peak_bytes(partial(_time_pass, case), settings.torch_device)
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
    seconds = measure_rounds(cases, settings.rounds, lambda name, _: _time_pass(cases[name]))
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
    for name in ("dense", *settings.layers, *(peer.name for peer in peers)):
        if name != "SMoE" and name in medians and "SMoE" in medians:
            yield {"name": f"{name} to SMoE{suffix}", "times": medians[name] / medians["SMoE"]}


def _time_pass(case: LayerCase) -> tuple[float, float]:
    """Run a forward and a backward pass, and return the seconds of each."""
    device = case.x_BTM.device
    read_clock = device_clock(device)
    start = read_clock()
    with torch.autocast(device.type, torch.bfloat16):
        y_BTM = case.forward()
    middle = read_clock()
    case.backward(y_BTM)
    return middle - start, read_clock() - middle
