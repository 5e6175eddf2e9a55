"""Which node Ray will put each worker on: a forecast, to be shown before a run starts."""

from collections.abc import Sequence
from typing import NamedTuple


class Node(NamedTuple):
    name: str
    cpus: float
    """Free."""
    gpus: float
    """Free."""
    domain: str = ""
    """What a faster network joins it to; nodes without one are one domain."""

    def holds(self, cpus: int, gpus: int) -> int:
        """Workers that fit, each with so many of both."""
        return int(min(self.cpus // cpus, self.gpus // gpus) if gpus else self.cpus // cpus)


def packed(nodes: Sequence[Node], cpus: int, gpus: int, workers: int) -> list[Node]:
    """The node of each rank; of fewer ranks where the nodes hold no more.

    As Ray packs a placement group of equal bundles (BundlePackSchedulingPolicy of its
    src/ray/raylet/scheduling/policy), which is what Ray Train asks for: first the node of which one worker would leave
    the greatest share, filled before the next. Among equals Ray's order is arbitrary; here it is the given one. Ray
    Train numbers ranks node by node.

    Args:
        nodes: with what is free on them.
        cpus: of each worker.
        gpus: of each worker.
        workers: of all.
    """

    def left(node: Node) -> float:
        shares = [(node.cpus - cpus) / node.cpus] + ([(node.gpus - gpus) / node.gpus] if gpus else [])
        return sum(shares)

    able = [node for node in nodes if node.holds(cpus, gpus)]
    places = [node for node in sorted(able, key=left, reverse=True) for _ in range(node.holds(cpus, gpus))]
    return places[:workers]


def on_paper(nodes: int, cpus: int, gpus: int, nodes_per_domain: int | None = None) -> list[Node]:
    """Equal nodes that are not there, in domains of so many, or all in one."""
    domains = [f"domain{i // nodes_per_domain}" if nodes_per_domain else "" for i in range(nodes)]
    return [Node(f"node{i}", cpus, gpus, domain) for i, domain in enumerate(domains)]
