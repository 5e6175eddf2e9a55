"""From a checkpoint directory to what answers prompts, with no step in between."""

import torch
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer import boundaries, load_run_tokenizer, token_count
from mhmoe_ray.location import Location
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import read_manifest
from mhmoe_ray.serve.answer import Answerer, edge_texts
from mhmoe_ray.serve.chat_template import ChatTemplate
from mhmoe_ray.serve.engines import load_engine
from mhmoe_ray.spec import ServeSpec


def load_answerer(checkpoint: Location, spec: ServeSpec) -> Answerer:
    """The engine that the spec names with the model of a checkpoint, and its tokenizer.

    Args:
        checkpoint: a directory inside its run directory.
        spec: engine, precision, and how many requests.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or damaged.
        ServeError: the engine is not installed, or cannot compute this model; or the run's chat template is none.
    """
    torch.set_num_threads(1)  # of this thread; the engine's own computes (see `TorchEngine`)
    manifest = read_manifest(checkpoint, parts=("weights",))
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    template = ChatTemplate.of_run(RunDir.of_checkpoint(checkpoint), *edge_texts(tokenizer))
    return Answerer(load_engine(checkpoint, manifest, tokenizer, spec), tokenizer, template)


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
    from mhmoe_ray.serve.own_engine import own_engine  # which replicas of vLLM go without

    engine = own_engine(model, boundaries(tokenizer).ends, token_count(tokenizer), seq_len, spec)
    return Answerer(engine, tokenizer, template)
