"""Routers of vision models."""

from mhmoe_ray.model.router import Router, TaskRouter
from mhmoe_ray.spec import ModelSpec


def build_router(spec: ModelSpec) -> Router:
    """Return the router of one layer, which may have weights for each task."""
    assert spec.vision is not None
    assert spec.moe is not None
    return TaskRouter(spec.row_width, spec.moe, list(spec.vision.tasks), is_shared=spec.vision.routers == "shared")
