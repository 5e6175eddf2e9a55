"""The order of training samples as a plain loop with counters, one sample after another: the oracle of order.py."""

from collections.abc import Iterator, Sequence

from mhmoe_ray.data.order.order import OrderedDomain, Phase, seeded

SOURCE_ERROR, DOMAIN_ERROR = 3.36, 6.72
"""Largest errors of sources and of domains, in slots, as data/order/order.py proves them."""


class Leaf:
    def __init__(self, weight: int, number: int) -> None:
        self.weight, self.number = weight, number

    def deal(self) -> int:
        return self.number


class Node:
    """Inner node that deals a slot to its left child whenever the left weights have added up to another whole weight of
    its own."""

    def __init__(self, number: int, left: "Leaf | Node", right: "Leaf | Node") -> None:
        self.weight, self.number, self.left, self.right = left.weight + right.weight, number, left, right
        self.owed = 0

    def deal(self) -> int:
        self.owed += self.left.weight
        if self.owed >= self.weight:
            self.owed -= self.weight
            return self.left.deal()
        return self.right.deal()


class Grove:
    """Builder of trees that numbers nodes on from the domains, over all trees, since ties go to the older node."""

    def __init__(self, domains: int) -> None:
        self.next = domains

    def merge(self, trees: list[Leaf | Node]) -> Leaf | Node:
        trees = list(trees)
        while len(trees) > 1:
            trees.sort(key=lambda t: (t.weight, t.number))
            left, right, *others = trees
            trees = [*others, Node(self.next, left, right)]
            self.next += 1
        return trees[0]

    def tree(self, sources: Sequence[str], weights: Sequence[int]) -> Leaf | Node:
        leaves = {s: [Leaf(w, i) for i, w in enumerate(weights) if w and sources[i] == s] for s in sources}
        return self.merge([self.merge(own) for own in leaves.values() if own])


def plain_order(
    seed: int, domains: Sequence[OrderedDomain], phases: Sequence[Phase], length: int
) -> Iterator[tuple[int, int]]:
    """Yield the (domain, sample) of positions 0 .. length - 1."""
    grove, read = Grove(len(domains)), [0] * len(domains)
    trees = [grove.tree([d.source for d in domains], phase.weights) for phase in phases]
    ends = [*(p.start for p in phases[1:]), length]
    for number, (phase, tree, end) in enumerate(zip(phases, trees, ends, strict=True)):
        for _ in range(seeded(seed, f"phase {number}") % sum(phase.weights)):
            tree.deal()
        for _ in range(phase.start, min(end, length)):
            domain = tree.deal()
            epoch, place = divmod(read[domain], domains[domain].samples)
            key = mixed(seeded(seed, domains[domain].name) + epoch * 0x9E3779B97F4A7C15)
            read[domain] += 1
            yield domain, permuted(place, domains[domain].samples, key)


def mixed(x: int) -> int:
    """Return splitmix64's finaliser of x."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def permuted(place: int, size: int, key: int) -> int:
    """Return the position of a place after the permutation.

    The place is a cell of a rectangle, which is moved along rows and columns in turn until it is one of the first
    `size` cells.
    """
    width = next(w for w in range(1, size + 1) if w * w >= size)
    height = -(-size // width)
    while True:
        row, column = divmod(place, width)
        for turn in range(12):
            shift = key + turn * (key >> 32 | 1)
            if turn % 2:
                column = (column + scattered(row + shift, width)) % width
            else:
                row = (row + scattered(column + shift, height)) % height
        place = row * width + column
        if place < size:
            return place


def scattered(x: int, below: int) -> int:
    x = x * 0x85EBCA6B % 2**32
    x = (x ^ x >> 15) * 0xC2B2AE35 % 2**32
    return x * below >> 32
