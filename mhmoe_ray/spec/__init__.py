"""What a user writes: one YAML file that wholly describes a run. No torch, no ray."""

from mhmoe_ray.spec.cluster import ClusterSpec
from mhmoe_ray.spec.data import DataSpec, SourceSpec
from mhmoe_ray.spec.load import dump_spec, load_deploy_spec, load_spec, parse_overrides
from mhmoe_ray.spec.model import ModelSpec, MoESpec
from mhmoe_ray.spec.run import RunSpec
from mhmoe_ray.spec.serve import DeploySpec, ServeSpec
from mhmoe_ray.spec.train import TrainSpec

__all__ = [
    "ClusterSpec",
    "DataSpec",
    "DeploySpec",
    "MoESpec",
    "ModelSpec",
    "RunSpec",
    "ServeSpec",
    "SourceSpec",
    "TrainSpec",
    "dump_spec",
    "load_deploy_spec",
    "load_spec",
    "parse_overrides",
]
