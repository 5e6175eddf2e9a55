"""Construction of the model that a spec describes."""

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.encoder import Encoder
from mhmoe_ray.model.vision import Vision
from mhmoe_ray.spec import ModelSpec


def build_model(spec: ModelSpec, expert_ids: range | None = None) -> Decoder | Encoder | Vision:
    """Create the decoder, encoder or vision model that a spec describes, with uninitialized weights.

    Args:
        spec: the model's sizes and options.
        expert_ids: global ids of the experts that this process holds in every layer; by default all.
    """
    if spec.vision is not None:
        return Vision(spec, expert_ids)
    return (Decoder if spec.encoder is None else Encoder)(spec, expert_ids)
