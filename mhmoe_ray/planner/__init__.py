"""From what a user wrote to a whole spec and its numbers, by arithmetic alone: nothing is built, torch is not imported.

resolve.py      a spec file with its preset, size and match worked out; presets by name
presets.py      presets in families of three sizes        papers.py       the papers' models
match.py        width and count of experts that equal a reference, and the comparison with it
sizes.py        parameters, multiply-adds, bytes of numbers
placement.py    ranks on nodes, and expert-parallel groups
memory.py       bytes that a rank holds                   traffic.py      bytes that ranks exchange, by link
schema.py       JSON schemas of the files that users write
expert_step.py  work and traffic of the expert step       estimate.py     how long a step takes
"""
