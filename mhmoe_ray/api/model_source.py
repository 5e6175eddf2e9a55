"""A stored model whose weights are not loaded yet: a run's checkpoint, or a folder in Hugging Face's layout."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.data.chat.template import ChatTemplate
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import PromptEncoder, load_chat_template, parse_chat_template
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    from mhmoe_ray.model.decoder import Decoder


class ModelSource(NamedTuple):
    """A stored model: everything but its weights, and a function that loads the weights."""

    name: str
    model: ModelSpec
    seq_len: int
    encoder: PromptEncoder
    template: ChatTemplate | None
    ends: list[int]
    """Token ids that end a text, in addition to the tokenizer's own end tokens."""
    load_decoder: Callable[[], "Decoder"]


def checkpoint_source(checkpoint: Location, manifest: CheckpointManifest) -> ModelSource:
    """Return the stored model of a checkpoint, whose weights were already verified against `manifest`.

    A tokenizer that is missing or damaged is a CheckpointError or DataError, as is a vision model; an invalid chat
    template is a ServeError.
    """
    run, tokenizer = RunDir.of_checkpoint(checkpoint), load_run_tokenizer(checkpoint, manifest)

    def load_decoder() -> "Decoder":
        from mhmoe_ray.checkpoint.load import load_verified_model

        return load_verified_model(checkpoint, manifest)

    return ModelSource(
        f"{run.id}/{checkpoint.name}",
        manifest.model,
        manifest.seq_len,
        PromptEncoder(tokenizer, manifest.adds_start),
        load_chat_template(run, tokenizer),
        manifest.ends,
        load_decoder,
    )


def folder_source(folder: Path) -> ModelSource:
    """Return the stored model of a folder in Hugging Face's layout, without loading its weights.

    A damaged or incomplete folder, or a model that this package does not compute, is a CheckpointError; a tokenizer
    that does not fit is a DataError, and an invalid chat template a ServeError.
    """
    # This import is delayed, because the module imports torch, which takes long.
    from mhmoe_ray.checkpoint.huggingface.load import read_folder_model

    stored = read_folder_model(folder)
    template = parse_chat_template(stored.chat_template, stored.tokenizer, f"correct it in {folder}")
    encoder = PromptEncoder(stored.tokenizer, stored.adds_start)
    return ModelSource(folder.name, stored.model, stored.seq_len, encoder, template, stored.ends, stored.load_decoder)
