"""Arguments of commands that serve a checkpoint: the target, and options that stand for keys of the serve section."""

from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import print_note

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import DeploySpec
    from mhmoe_ray.storage import Location


def resolve_target(
    target: str | None, checkpoint: str | None, storage: str, overrides: list[str], trust_run: bool
) -> "tuple[RunDir, Location, DeploySpec]":
    """Call `api.serve_target.resolve_target`, and print its warnings."""
    from mhmoe_ray.api import serve_target

    return serve_target.resolve_target(target, checkpoint, storage, overrides, print_note, trust_run)


def option_overrides(replicas: str | None, engine: str | None) -> list[str]:
    """Return the overrides of the options --replicas, a number or a range like 1..4, and --engine."""
    overrides = []
    if replicas is not None:
        low, dots, high = replicas.partition("..")
        overrides.append(f"serve.replicas={{min: {low}, max: {high}}}" if dots else f"serve.replicas={replicas}")
    if engine is not None:
        overrides.append(f"serve.engine={engine}")
    return overrides
