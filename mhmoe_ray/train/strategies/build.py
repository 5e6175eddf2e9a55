"""From the spec's word to the strategy."""

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.mesh import Mesh
from mhmoe_ray.train.strategies.replicated import Fill, Strategy


def build_strategy(model: Decoder, mesh: Mesh, spec: RunSpec, fill: Fill) -> Strategy:
    """Of a model without memory, which `fill` gives it. Collective. With one worker there is nothing to share out, so
    that all strategies are the same.

    Raises:
        SpecError: what the strategy needs is not installed.
    """
    name = spec.cluster.strategy
    if mesh.world == 1 or name == "ddp":
        return Strategy(model, mesh, spec.train, fill)
    if name == "fsdp":
        from mhmoe_ray.train.strategies.sharded import Sharded

        return Sharded(model, mesh, spec.train, fill, spec.cluster.shard_experts)
    from mhmoe_ray.train.strategies.zero import Zero

    return Zero(model, mesh, spec.train, fill, stage=int(name.removeprefix("zero")))
