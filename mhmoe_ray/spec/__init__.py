"""Spec of a run: one YAML file, written by the user, that describes the run completely.

Importing this package loads neither torch nor Ray.
"""

from mhmoe_ray.spec.cluster import ClusterSpec
from mhmoe_ray.spec.data import DataSpec, ImageSpec, PhaseSpec, SourceMix, SourceSpec
from mhmoe_ray.spec.encoder import EncoderSpec
from mhmoe_ray.spec.filters import FilterSpec, SignalRule
from mhmoe_ray.spec.formats import Column, Format
from mhmoe_ray.spec.load import (
    apply_overrides,
    dotted_items,
    dump_spec,
    load_deploy_spec,
    load_resolved_spec,
    load_site,
    load_sweep,
    parse_overrides,
    read_tree,
    validate_section,
)
from mhmoe_ray.spec.model import ModelSpec
from mhmoe_ray.spec.moe import MoESpec
from mhmoe_ray.spec.parts import LossKind, MicroBatchPart
from mhmoe_ray.spec.run import NON_TRAINING_KEYS, ReferenceSpec, RunSpec
from mhmoe_ray.spec.serve import DeploySpec, KeySpec, ServeSpec
from mhmoe_ray.spec.start import StartSpec
from mhmoe_ray.spec.sweep import SweepRun, SweepSize, SweepSpec
from mhmoe_ray.spec.train import TrainSpec
from mhmoe_ray.spec.vision import AdaptiveSpec, DetectorSpec, TaskSpec, VisionSpec

__all__ = [
    "NON_TRAINING_KEYS",
    "AdaptiveSpec",
    "ClusterSpec",
    "Column",
    "DataSpec",
    "DeploySpec",
    "DetectorSpec",
    "EncoderSpec",
    "FilterSpec",
    "Format",
    "ImageSpec",
    "KeySpec",
    "LossKind",
    "MicroBatchPart",
    "MoESpec",
    "ModelSpec",
    "PhaseSpec",
    "ReferenceSpec",
    "RunSpec",
    "ServeSpec",
    "SignalRule",
    "SourceMix",
    "SourceSpec",
    "StartSpec",
    "SweepRun",
    "SweepSize",
    "SweepSpec",
    "TaskSpec",
    "TrainSpec",
    "VisionSpec",
    "apply_overrides",
    "dotted_items",
    "dump_spec",
    "load_deploy_spec",
    "load_resolved_spec",
    "load_site",
    "load_sweep",
    "parse_overrides",
    "read_tree",
    "validate_section",
]
