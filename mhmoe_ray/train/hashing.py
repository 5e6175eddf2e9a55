"""Hashes of a checkpoint's files, found by all nodes of the cluster: one alone reads terabytes for an hour."""

from collections.abc import Iterable, Iterator, Sequence

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mhmoe_ray.storage import FileEntry, Location, describe_files

ALONE = 4 << 30
"""Bytes that are not worth asking others for: a process must start there first."""


def describe_together(files: Sequence[Location]) -> Iterable[FileEntry]:
    """Size and hash of each, in order, as they are found. They lie where all nodes see them."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 or sum(file.stat().st_size for file in files) < ALONE:
        return describe_files(files)
    shares = [files[i :: len(nodes)] for i in range(len(nodes))]
    # A node that dies meanwhile has its share read elsewhere.
    there = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    found = [_describe.options(scheduling_strategy=at).remote(share) for at, share in zip(there, shares, strict=True)]
    return (ray.get(next(found[i % len(nodes)])) for i in range(len(files)))


@ray.remote(num_cpus=0, num_returns="streaming")  # type: ignore[untyped-decorator]  # Ray's have no types for us
def _describe(files: Sequence[Location]) -> Iterator[FileEntry]:
    yield from describe_files(files)
