"""From what a user wrote to a whole spec and its numbers, by arithmetic alone: nothing is built, torch is not imported.

resolve.py      a spec file with its preset, size and match worked out
presets.py      families of models at three sizes      papers.py    the papers' models by name
match.py        expert width and count that equal a reference in compute, in parameters, or in both
sizes.py        parameters and multiply-adds           step.py      work and traffic of the expert step
memory.py       bytes a rank holds                     traffic.py   bytes that ranks exchange
"""
