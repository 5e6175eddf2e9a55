"""Helpers for runs of a tiny model on the cluster of several nodes."""

from pathlib import Path
from typing import Any

from mhmoe_ray.planner.placement import ExpertGroups, expert_groups
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import dump_spec
from tests.cli.run import Result, mhmoe
from tests.several_nodes.nodes import Nodes
from tests.support.specs import tiny_spec
from tests.support.watch import newest_run


def write_spec(project: Path, **sections: dict[str, Any]) -> None:
    """Write spec.yaml of a run with 4 workers of 2 CPUs, and so many steps that a test has to stop it.

    Args:
        project: The project folder.
        sections: Keys to replace, as a mapping for each of the sections cluster, data and train.
    """
    defaults: dict[str, dict[str, Any]] = {
        "cluster": {"workers": 4, "ep": 2, "cpus_per_worker": 2, "shared_filesystem": True},
        "data": {"validation_fraction": 0.2},
        "train": {"lr": 3e-4, "steps": 5000, "validate_every": 100, "checkpoint_every": 10, "keep_checkpoints": 3},
    }
    merged = {name: {**keys, **sections.get(name, {})} for name, keys in defaults.items()}
    (project / "spec.yaml").write_text(dump_spec(tiny_spec(project, **merged)))


def run_command(nodes: Nodes, project: Path, *args: str) -> Result:
    """Run `mhmoe args` in the project folder, with the environment of a user of the cluster."""
    return mhmoe(project, *args, **nodes.environment)


def submit(nodes: Nodes, project: Path, **sections: dict[str, Any]) -> RunDir:
    """Write a spec, submit it to the cluster without following the run, and return the run."""
    write_spec(project, **sections)
    result = run_command(nodes, project, "submit", "spec.yaml", "--address", nodes.address, "--detach")
    assert result.code == 0, result.err
    return newest_run(project)


def layout(nodes: Nodes, event: dict[str, Any], label: str | None = None) -> tuple[list[str], ExpertGroups]:
    """Return the nodes on which a run's workers were started, and the expert-parallel groups that these nodes imply.

    Args:
        nodes: The cluster, whose nodes must still be alive.
        event: The run's `started` event, which names the node of each rank.
        label: The node label whose value is a node's domain; None if all nodes are in one domain.

    Returns:
        The sorted node indices of all ranks, and the expected groups for ep = 2.
    """
    ids = [worker["node"] for worker in event["workers"]]
    indices, labels = nodes.labels("node_index"), nodes.labels(label) if label else None
    return sorted(indices[i] for i in ids), expert_groups(ids, 2, [labels[i] for i in ids] if labels else None)


def assert_as_planned(event: dict[str, Any], groups: ExpertGroups) -> None:
    """Assert that a `started` event has these groups, and the numbers of those that span nodes and domains."""
    assert event["groups"] == groups.ranks
    assert event["straddling_groups"] == len(groups.straddling_indices)
    assert event["groups_apart"] == len(groups.cross_domain_indices)
