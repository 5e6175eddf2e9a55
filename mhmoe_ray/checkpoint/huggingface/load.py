"""Loading of a model from a folder in Hugging Face's layout straight into memory, without an import."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from mhmoe_ray.checkpoint.huggingface.config import read_config
from mhmoe_ray.checkpoint.huggingface.import_ import open_groups
from mhmoe_ray.checkpoint.huggingface.imported_tokenizer import read_chat_template, read_folder_tokenizer
from mhmoe_ray.checkpoint.load import inference_decoder
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import ModelSpec


class FolderModel(NamedTuple):
    """A model in a folder in Hugging Face's layout. Its weights are not loaded until `load_decoder` is called."""

    folder: Path
    model_type: str
    """`model_type` in the folder's config.json."""
    model: ModelSpec
    seq_len: int
    tokenizer: Tokenizer
    adds_start: bool
    """Whether a start token precedes each text."""
    ends: list[int]
    """Token ids that end a text, in addition to the tokenizer's own end tokens."""
    chat_template: str | None

    def load_decoder(self) -> Decoder:
        """Load the weights into a decoder with all experts, in evaluation mode, float32, without gradients.

        Raises:
            CheckpointError: the folder cannot be read, or does not hold exactly the tensors of the model.
        """
        decoder = inference_decoder(self.model)
        tensors = decoder.named_tensors()
        with open_groups(self.folder, self.model_type, self.model) as groups:
            for group in groups:
                for name, tensor in group.items():
                    # Files may store a scalar without a dimension.
                    tensors[name].copy_(tensor.reshape(tensors[name].shape))
        return decoder


def read_folder_model(folder: Path) -> FolderModel:
    """Read and check everything but the weights of a model in a folder in Hugging Face's layout.

    Raises:
        CheckpointError: the folder lacks a file, is damaged, or holds a model that this package does not compute.
        DataError: its tokenizer does not fit the model.
    """
    model_type, section = read_config(folder, None)
    imported = read_folder_tokenizer(folder, section)
    tokenizer = Tokenizer.from_buffer(imported.content)
    # A tokenizer.json may ask for truncation or padding, which would change prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return FolderModel(
        folder,
        model_type,
        section.model,
        section.seq_len,
        tokenizer,
        imported.adds_start,
        imported.end_tokens,
        read_chat_template(folder),
    )
