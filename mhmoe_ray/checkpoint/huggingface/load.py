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
    """A model in a folder in Hugging Face's layout, whose weights only `load_decoder` loads."""

    folder: Path
    model_type: str
    model: ModelSpec
    seq_len: int
    tokenizer: Tokenizer
    adds_start: bool
    ends: list[int]
    """Token ids that end a text, in addition to the tokenizer's own."""
    chat_template: str | None

    def load_decoder(self) -> Decoder:
        """Load the weights into a decoder with all experts, in evaluation mode, float32, without gradients.

        A folder that cannot be read, or that holds other tensors than the model's, is a CheckpointError.
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
    """Read and check everything but the weights of a folder in Hugging Face's layout.

    An incomplete, damaged or unsupported folder is a CheckpointError, a tokenizer that does not fit a DataError.
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
