"""A stored model whose weights are not loaded yet: a run's checkpoint, or a folder in Hugging Face's layout."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.huggingface.config import read_config
from mhmoe_ray.checkpoint.huggingface.imported_tokenizer import read_chat_template, read_folder_tokenizer
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
    model_type, section = read_config(folder, None)
    imported = read_folder_tokenizer(folder, section)
    tokenizer = Tokenizer.from_buffer(imported.content)
    # A tokenizer.json may ask for truncation or padding, which would change prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def load_decoder() -> "Decoder":
        # This import is delayed, because the module imports torch, which takes long.
        from mhmoe_ray.checkpoint.huggingface.load import load_folder_decoder

        return load_folder_decoder(folder, model_type, section.model)

    return ModelSource(
        folder.name,
        section.model,
        section.seq_len,
        PromptEncoder(tokenizer, imported.adds_start),
        parse_chat_template(read_chat_template(folder), tokenizer, f"correct it in {folder}"),
        imported.end_tokens,
        load_decoder,
    )
