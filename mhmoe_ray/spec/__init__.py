"""The spec: one YAML file, written by the user, that describes a run completely. No torch, no ray."""

from mhmoe_ray.spec.cluster import ClusterSpec
from mhmoe_ray.spec.data import DataSpec, Format, PhaseSpec, SourceMix, SourceSpec
from mhmoe_ray.spec.filters import FilterSpec, SignalRule
from mhmoe_ray.spec.load import (
    checked,
    dump_spec,
    leaves,
    load_deploy_spec,
    load_resolved_spec,
    load_site,
    load_sweep,
    overridden,
    parse_overrides,
    read_tree,
)
from mhmoe_ray.spec.model import ModelSpec, MoESpec
from mhmoe_ray.spec.run import ELSEWHERE, ReferenceSpec, RunSpec
from mhmoe_ray.spec.serve import DeploySpec, KeySpec, ServeSpec
from mhmoe_ray.spec.sweep import SweepRun, SweepSize, SweepSpec
from mhmoe_ray.spec.train import TrainSpec

__all__ = [
    "ELSEWHERE",
    "ClusterSpec",
    "DataSpec",
    "DeploySpec",
    "FilterSpec",
    "Format",
    "KeySpec",
    "MoESpec",
    "ModelSpec",
    "PhaseSpec",
    "ReferenceSpec",
    "RunSpec",
    "ServeSpec",
    "SignalRule",
    "SourceMix",
    "SourceSpec",
    "SweepRun",
    "SweepSize",
    "SweepSpec",
    "TrainSpec",
    "checked",
    "dump_spec",
    "leaves",
    "load_deploy_spec",
    "load_resolved_spec",
    "load_site",
    "load_sweep",
    "overridden",
    "parse_overrides",
    "read_tree",
]
