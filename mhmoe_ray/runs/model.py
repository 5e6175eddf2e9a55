"""From a checkpoint directory to a model, with no step in between."""

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.runs.manifest import Manifest, read_manifest
from mhmoe_ray.runs.tensors import load_tensors
from mhmoe_ray.storage import Location


def load_model(checkpoint: Location) -> tuple[Decoder, Manifest]:
    """The model of a checkpoint written at any expert-parallel size, with all experts, ready for inference.

    Returns:
        The decoder in evaluation mode, float32, without gradients; and the manifest it was built from.

    Raises:
        CheckpointError: the checkpoint is uncommitted, torn or damaged, or does not hold the model its manifest names.
    """
    manifest = read_manifest(checkpoint, parts=("weights",))
    return model_of(checkpoint, manifest), manifest


def model_of(checkpoint: Location, manifest: Manifest) -> Decoder:
    """As `load_model`, of a checkpoint whose manifest was read and whose weights were found whole."""
    model = Decoder(manifest.model).requires_grad_(False).eval()
    for layer in model.moe_layers():
        layer.experts.kernel = "auto"  # that of the training may need a device or a package that is not here
    load_tensors(checkpoint / "weights", model.tensors())
    return model
