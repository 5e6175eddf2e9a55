"""Loading of a model from a folder in Hugging Face's layout straight into memory, without an import."""

from pathlib import Path

from mhmoe_ray.checkpoint.huggingface.import_ import open_groups
from mhmoe_ray.checkpoint.load import inference_decoder
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import ModelSpec


def load_folder_decoder(folder: Path, model_type: str, model: ModelSpec) -> Decoder:
    """Load the weights into a decoder with all experts, in evaluation mode, float32, without gradients.

    A folder that cannot be read, or that holds other tensors than the model's, is a CheckpointError.
    """
    decoder = inference_decoder(model)
    tensors = decoder.named_tensors()
    with open_groups(folder, model_type, model) as groups:
        for group in groups:
            for name, tensor in group.items():
                # Files may store a scalar without a dimension.
                tensors[name].copy_(tensor.reshape(tensors[name].shape))
    return decoder
