"""Resolve a spec file into a complete spec, and compute its numbers without building a model or importing torch.

resolve.py      spec files with preset, size and match; presets by name
presets.py      presets in families of three sizes        papers.py       the papers' models
match.py        expert width and count that match a reference, and the comparison with it
sizes.py        parameters, multiply-adds, bytes per number
heads.py        those of the stem and the heads of vision models
placement.py    ranks on nodes, and expert-parallel groups
memory.py       bytes that a rank holds                   activations.py  those that layers keep for the backward
traffic.py      bytes that ranks exchange, by link
schema.py       JSON schemas of the files that users write
expert_step.py  work and traffic of the expert step       estimate.py     time per step
launches.py     kernels that a GPU is told to launch      remedies.py     keys that lower the memory of a rank
"""
