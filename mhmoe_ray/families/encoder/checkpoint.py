"""Encoders from checkpoints."""

from mhmoe_ray.checkpoint.load import load_for_inference
from mhmoe_ray.checkpoint.manifest import CheckpointManifest
from mhmoe_ray.families.encoder.model import Encoder
from mhmoe_ray.storage import Location


def load_verified_encoder(checkpoint: Location, manifest: CheckpointManifest) -> Encoder:
    """Load the encoder of a checkpoint for inference. The caller has verified the files with `read_manifest`."""
    return load_for_inference(Encoder(manifest.model), checkpoint)
