"""Construction of the model that a spec describes."""

from collections.abc import Callable

from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import ModelSpec


def build_model(spec: ModelSpec, expert_ids: range | None = None) -> Trunk:
    """Create a spec's model with uninitialized weights and each layer's experts `expert_ids`, by default all."""
    model: Callable[[ModelSpec, range | None], Trunk] = spec.family.part("model")
    return model(spec, expert_ids)
