"""From a checkpoint directory to what answers prompts, with no step in between."""

import torch

from mhmoe_ray.checkpoint.load import load_run_tokenizer
from mhmoe_ray.checkpoint.manifest import Manifest, read_manifest
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serve.answer import Answerer, edge_texts
from mhmoe_ray.serve.chat_template import ChatTemplate
from mhmoe_ray.serve.engines import load_engine
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location


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
    torch.set_num_threads(1)  # of this thread; the engine's own computes (see `TorchEngine`)
    manifest = manifest or read_manifest(checkpoint, parts=("weights",))
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    template = ChatTemplate.of_run(RunDir.of_checkpoint(checkpoint), *edge_texts(tokenizer))
    return Answerer(load_engine(checkpoint, manifest, tokenizer, spec), tokenizer, template)
