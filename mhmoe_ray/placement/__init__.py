"""Which ranks form which expert-parallel group, and where they lie. Pure: nodes in, ranks out; no torch, no ray.

groups.py    ranks of each group, by the nodes that they are on    packing.py    the nodes they will be on, a forecast
layout.py    both together, and how a group is spread
"""
