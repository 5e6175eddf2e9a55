"""Reference for tests of order.py: the order of training samples, computed by a plain loop with counters."""

from collections.abc import Iterator, Sequence

from mhmoe_ray.data.draws import seeded_hash
from mhmoe_ray.data.order.order import OrderedDomain, Phase

SOURCE_ERROR, DOMAIN_ERROR = 3.36, 6.72
"""Bounds, proven in data/order/interleaver.py, of the slots by which sources and domains differ from their shares."""


class Leaf:
    """Leaf of a tree: each slot that reaches it goes to the domain `index`."""

    def __init__(self, weight: int, index: int) -> None:
        self.weight, self.index = weight, index

    def next_domain(self) -> int:
        return self.index


class Node:
    """Inner node of a tree, which hands slots to its two children in proportion to their weights.

    Each slot adds the left child's weight to a credit. If the credit reaches the node's weight, the left child gets
    the slot and the credit is reduced by that weight; otherwise the right child gets it.
    """

    def __init__(self, index: int, left_child: "Leaf | Node", right_child: "Leaf | Node") -> None:
        self.weight, self.index, self.left_child, self.right_child = (
            left_child.weight + right_child.weight,
            index,
            left_child,
            right_child,
        )
        self.credit = 0

    def next_domain(self) -> int:
        """Return the domain of the next slot."""
        self.credit += self.left_child.weight
        if self.credit >= self.weight:
            self.credit -= self.weight
            return self.left_child.next_domain()
        return self.right_child.next_domain()


class TreeBuilder:
    """Builder of Huffman trees with domains as leaves.

    Inner nodes of all its trees are numbered consecutively, from the number of domains on. Of two nodes of equal
    weight, the one with the smaller number is merged first.
    """

    def __init__(self, domains: int) -> None:
        self.next_index = domains

    def merge_trees(self, trees: list[Leaf | Node]) -> Leaf | Node:
        """Merge trees into one as Huffman's algorithm does: repeatedly merge the two lightest."""
        trees = list(trees)
        while len(trees) > 1:
            trees.sort(key=lambda t: (t.weight, t.index))
            left_child, right_child, *remaining_trees = trees
            trees = [*remaining_trees, Node(self.next_index, left_child, right_child)]
            self.next_index += 1
        return trees[0]

    def build_tree(self, sources: Sequence[str], weights: Sequence[int]) -> Leaf | Node:
        """Return a tree of the sources, each of which is a tree of its domains; domains of weight 0 are left out."""
        leaves = {s: [Leaf(w, i) for i, w in enumerate(weights) if w and sources[i] == s] for s in sources}
        return self.merge_trees([self.merge_trees(source_leaves) for source_leaves in leaves.values() if source_leaves])


def plain_order(
    seed: int, domains: Sequence[OrderedDomain], phases: Sequence[Phase], length: int
) -> Iterator[tuple[int, int]]:
    """Yield the index of the domain, and the number of the sample in it, for positions 0 .. `length` - 1."""
    tree_builder, read_counts = TreeBuilder(len(domains)), [0] * len(domains)
    trees = [tree_builder.build_tree([d.source for d in domains], phase.weights) for phase in phases]
    ends = [*(p.start for p in phases[1:]), length]
    for index, (phase, tree, end) in enumerate(zip(phases, trees, ends, strict=True)):
        for _ in range(seeded_hash(seed, f"phase {index}") % sum(phase.weights)):
            tree.next_domain()
        for _ in range(phase.start, min(end, length)):
            domain = tree.next_domain()
            epoch, position = divmod(read_counts[domain], domains[domain].samples)
            key = mix_bits(seeded_hash(seed, domains[domain].name) + epoch * 0x9E3779B97F4A7C15)
            read_counts[domain] += 1
            yield domain, permute_position(position, domains[domain].samples, key)


def mix_bits(x: int) -> int:
    """Return the finaliser of splitmix64 applied to `x` modulo 2^64."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def permute_position(position: int, size: int, key: int) -> int:
    """Return the number to which the keyed permutation of 0 .. `size` - 1 maps `position`.

    A position is a cell of a nearly square rectangle. Twelve rounds shift the cell along its column or its row in turn.
    They are repeated until the cell is one of the first `size` cells.
    """
    width = next(w for w in range(1, size + 1) if w * w >= size)
    height = -(-size // width)
    while True:
        row, column = divmod(position, width)
        for round_index in range(12):
            shift = key + round_index * (key >> 32 | 1)
            if round_index % 2:
                column = (column + scatter(row + shift, width)) % width
            else:
                row = (row + scatter(column + shift, height)) % height
        position = row * width + column
        if position < size:
            return position


def scatter(x: int, bound: int) -> int:
    """Hash `x` to a number from 0 to `bound` - 1."""
    x = x * 0x85EBCA6B % 2**32
    x = (x ^ x >> 15) * 0xC2B2AE35 % 2**32
    return x * bound >> 32
