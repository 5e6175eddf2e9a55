"""Assignment of the slots of an endless sequence to domains, in any proportions; any slot is found directly.

A binary tree has the domains as leaves. A leaf weighs its domain's weight, another node the sum of its children. Each
slot walks from the root to a leaf. A node's c-th visitor (from 0) goes left if floor((c + 1) a / A) exceeds floor(c a /
A), where A is the node's weight and a its left child's. So floor(c a / A) of its first c visitors went left, which is
the visitor's number at the left child; at the right child its number is c minus this. At the leaf it is the slot's
number among its domain's slots. The sequence repeats after as many slots as the root's weight, and each domain has
exactly its weight of these.

Exactness: over any stretch of slots a child gets its share of its parent's visitors to within less than one. With
weights W_0 > W_1 > ... > W_m from the root to a leaf, n consecutive slots give that leaf n W_m / W_0 to within less
than the sum of W_m / W_k over k = 1..m. In a Huffman tree W_k >= W_(k+1) + W_(k+2), because the sibling of node k+1 is
no lighter than node k+2, which was merged first. So the W_k grow at least as fast as the Fibonacci numbers from the
leaf up, and the sum stays below that of the reciprocals, 1 + 1 + 1/2 + 1/3 + 1/5 + ... = 3.36, for any domains and
shares. Sources are the leaves of one Huffman tree and the roots of others, so a source stays within 3.36 slots of its
share and a domain within 6.72.

A walk takes about as many levels as the mixture has bits of entropy, and at most about log_phi(1 / s) to a domain with
share s, where phi is the golden ratio.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from mhmoe_ray.data.order.permutation import I64

MAX_WEIGHT = 2**50
"""Largest weight of a root. A slot below twice this weight, times a ratio of at most one half, has an error of less
than one in float64."""


class Interleaver:
    """Binary trees over the same domains, one for each set of proportions.

    `weights` has each tree's slots by domain before the sequence repeats, from 1 to `MAX_WEIGHT` in all.
    """

    def __init__(self, sources: Sequence[str], weights: Sequence[Sequence[int]]) -> None:
        self.domain_count = len(sources)
        # A node is a tuple: the weight of its left child, the sum of the weights of both children, and the two
        # children. The nodes of all trees are in one list, so that a walk can descend different trees in one array
        # operation.
        self._nodes: list[tuple[int, int, int, int]] = []
        self._roots = [self._build_tree(sources, tree) for tree in weights]
        # A child is the number of a domain, or `domain_count` plus the index of a node.
        nodes = np.asarray(self._nodes, np.int64).reshape(-1, 4)
        self._left_weights, self._weights, self._children = nodes[:, 0].copy(), nodes[:, 1].copy(), nodes[:, 2:].ravel()
        # The ratio is rounded up. Otherwise a product that should be a whole number could come out just below that
        # number, and would be truncated to the number before it.
        self._ratios = np.nextafter(self._left_weights / self._weights, np.inf)

    def _build_tree(self, sources: Sequence[str], weights: Sequence[int]) -> int:
        assert min(weights) >= 0
        assert 0 < sum(weights) <= MAX_WEIGHT
        by_source: dict[str, list[tuple[int, int]]] = {}
        for domain, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if weight:
                by_source.setdefault(source, []).append((weight, domain))
        return self._merge_nodes([self._merge_nodes(leaves) for leaves in by_source.values()])[1]

    def _merge_nodes(self, heap: list[tuple[int, int]]) -> tuple[int, int]:
        """Merge (weight, number) pairs of nodes by Huffman's algorithm; return the root."""
        heapq.heapify(heap)
        while len(heap) > 1:
            light_node, heavy_node = heapq.heappop(heap), heapq.heappop(heap)
            parent = light_node[0] + heavy_node[0], self.domain_count + len(self._nodes)
            self._nodes.append((light_node[0], parent[0], light_node[1], heavy_node[1]))
            heapq.heappush(heap, parent)
        return heap[0]

    def __call__(self, tree: I64, slot: I64) -> tuple[I64, I64]:
        """Return each slot's domain and its number there, elementwise; `tree` numbers each slot's tree.

        A slot is below twice the weight of its root.
        """
        domain, rank = np.empty_like(slot), np.empty_like(slot)
        # `indices` holds the positions, in the result arrays, of the slots whose walk down their tree has not reached a
        # leaf.
        indices, node, visitor = np.arange(len(slot)), np.asarray(self._roots).take(tree), slot
        while True:
            is_leaf = node < self.domain_count
            finished = np.flatnonzero(is_leaf)
            if len(finished):
                finished_indices = indices.take(finished)
                domain[finished_indices], rank[finished_indices] = node.take(finished), visitor.take(finished)
                unfinished = np.flatnonzero(~is_leaf)
                if not len(unfinished):
                    return domain, rank
                indices, node, visitor = indices.take(unfinished), node.take(unfinished), visitor.take(unfinished)
            node, visitor = self._descend(node - self.domain_count, visitor)

    def _descend(self, node: I64, visitor: I64) -> tuple[I64, I64]:
        """Return the child that each slot goes to, and the slot's number there."""
        left_weight, weight = self._left_weights.take(node), self._weights.take(node)
        left_visitor = (visitor * self._ratios.take(node)).astype(np.int64)
        # The products wrap round 2^64, but their difference is small, so the remainder is right.
        remainder = visitor * left_weight - left_visitor * weight
        is_off = remainder.view(np.uint64) >= weight.view(np.uint64)
        if is_off.any():
            correction = np.where(remainder < 0, -1, 1) * is_off
            left_visitor += correction
            remainder -= correction * weight
        goes_right = remainder < weight - left_weight
        return self._children.take(2 * node + goes_right), np.where(goes_right, visitor - left_visitor, left_visitor)

    def slot_counts(self, tree: int, slot: int) -> list[int]:
        """Return each domain's number of slots among a tree's first `slot` slots."""
        counts = [0] * self.domain_count
        pending_nodes = [(self._roots[tree], slot)]
        while pending_nodes:
            node, visitors = pending_nodes.pop()
            if node < self.domain_count:
                counts[node] = visitors
                continue
            left_weight, weight, *children = self._nodes[node - self.domain_count]
            left_visitors = visitors * left_weight // weight
            pending_nodes += [(children[0], left_visitors), (children[1], visitors - left_visitors)]
        return counts
