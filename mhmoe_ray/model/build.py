"""Construction of the model that a spec describes."""

from collections.abc import Callable

from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import ModelSpec


def build_model(spec: ModelSpec, expert_ids: range | None = None) -> Trunk:
    """Create the model of a spec with uninitialized weights and, in every layer, the experts of `expert_ids`, by
    default all."""
    model: Callable[[ModelSpec, range | None], Trunk] = spec.family.part("model")
    return model(spec, expert_ids)
