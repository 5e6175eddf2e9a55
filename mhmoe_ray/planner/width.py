"""The width that experts are measured by."""

from collections.abc import Mapping
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec.model import usual_width


def dense_width(trunk: Mapping[str, Any]) -> int:
    """What experts of a family are measured by: the trunk's own feed-forward width, or the usual one if it has none."""
    d_ff, d_model = trunk.get("d_ff"), trunk.get("d_model")
    if d_ff is None and isinstance(d_model, int):
        return usual_width(d_model)
    if not isinstance(d_ff, int):
        raise SpecError("model.d_ff", f"experts of a family follow from it, and it is {d_ff!r}", "give it a number")
    return d_ff
