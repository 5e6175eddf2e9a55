"""A model beside its reference: what is equal, and what is not."""

from typing import NamedTuple

from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.spec import ModelSpec


class Comparison(NamedTuple):
    own: int
    reference: int

    @property
    def ratio(self) -> float:
        return self.own / self.reference


def parity(model: ModelSpec, reference: ModelSpec) -> dict[str, Comparison]:
    """By name; what the reference has none of is left out. Routers are not counted among the multiply-adds of expert
    layers, as in both papers. A claim at equal parameters is not one at equal compute,
    and neither says anything of the traffic of hidden activations."""
    ours, theirs = sizes(model), sizes(reference)
    found = {
        "parameters": Comparison(ours.parameters, theirs.parameters),
        "active parameters": Comparison(ours.active_parameters, theirs.active_parameters),
        "multiply-adds per token": Comparison(ours.macs_per_token, theirs.macs_per_token),
        "multiply-adds of expert layers": Comparison(
            ours.moe_macs_per_token - ours.router_macs_per_token,
            theirs.moe_macs_per_token - theirs.router_macs_per_token,
        ),
        "hidden activations per token": Comparison(ours.hidden_per_token, theirs.hidden_per_token),
    }
    return {name: comparison for name, comparison in found.items() if comparison.reference}
