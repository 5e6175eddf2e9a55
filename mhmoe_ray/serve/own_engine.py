"""Our own engine around a model in memory."""

import torch

from mhmoe_kernels import packed
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import matrices
from mhmoe_ray.serve.engine.torch_engine import TorchEngine
from mhmoe_ray.serve.packed_model import pack
from mhmoe_ray.spec import ServeSpec


def own_engine(model: Decoder, ends: frozenset[int], known: int, seq_len: int, spec: ServeSpec) -> TorchEngine:
    """Our own engine with a model in memory; see `TorchEngine`.

    Args:
        model: with all experts, in evaluation mode, float32; the engine's own from now on.
        ends: tokens that end an answer.
        known: tokens that may be chosen, from 0.
        seq_len: tokens that prompt and answer may have together.
        spec: precision, and how many requests.
    """
    dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    if dtype == torch.bfloat16:
        _halve(model)
    if spec.gpus_per_replica:
        model.to("cuda")  # after that: whole, it may not fit
    if model.embedding.weight.device.type == "cpu":
        suit_to_cpu(model, dtype)
    return TorchEngine(
        model,
        dtype,
        ends,
        known,
        seq_len,
        concurrency=spec.max_concurrency,
        queue=spec.max_waiting,
        threads=spec.cpus_per_replica,
        cache_tokens=spec.cache_tokens,
    )


def suit_to_cpu(model: Decoder, dtype: torch.dtype) -> None:
    """Give a model, in place, the products in which what a row gives depends on no other row.

    Args:
        model: with all experts, on a CPU.
        dtype: of its matrices.
    """
    if packed.why_not(dtype) is None:
        pack(model)
    else:
        for layer in model.moe_layers():
            layer.experts.kernel = "padded"


def _halve(model: Decoder) -> None:
    """Weights of matrix products in bfloat16; not the routers', nor those of norms."""
    for name in matrices(model):
        if ".router." not in name:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(torch.bfloat16)
