"""Routers of encoders."""

from mhmoe_ray.model.moe import build_plain_router
from mhmoe_ray.model.router import ModalityRouter, Router
from mhmoe_ray.spec import ModelSpec


def build_router(spec: ModelSpec) -> Router:
    """Return the router of one layer, which may have weights for each modality."""
    assert spec.encoder is not None
    assert spec.moe is not None
    if spec.encoder.routers == "per_modality":
        return ModalityRouter(spec.row_width, spec.moe)
    return build_plain_router(spec)
