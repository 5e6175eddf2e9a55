"""Construction of the model that a spec describes."""

from collections.abc import Callable

from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import ModelSpec


def build_model(spec: ModelSpec, expert_ids: range | None = None) -> Trunk:
    """Create the model that a spec describes, with uninitialized weights.

    Args:
        spec: the model's sizes and options.
        expert_ids: global ids of the experts that this process holds in every layer; by default all.
    """
    model: Callable[[ModelSpec, range | None], Trunk] = spec.family.part("model")
    return model(spec, expert_ids)
