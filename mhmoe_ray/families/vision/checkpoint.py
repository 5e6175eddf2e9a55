"""Vision models from checkpoints."""

from mhmoe_ray.checkpoint.load import load_for_inference
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.families.vision.model import Vision
from mhmoe_ray.storage import Location


def load_verified_vision(checkpoint: Location, manifest: CheckpointManifest) -> Vision:
    """Load a vision model for inference, with the numbers of experts that training adapted, if it did.

    The caller has verified the files with `read_manifest`.
    """
    model = load_for_inference(Vision(manifest.model), checkpoint)
    if manifest.objective is not None:
        model.set_top_k([task["top_k"] for task in manifest.objective["tasks"].values()])
    return model
