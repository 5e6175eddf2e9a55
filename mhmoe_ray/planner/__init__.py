"""From what a user wrote to a whole spec and its numbers, by arithmetic alone: nothing is built, torch is not imported.

resolve.py      a spec file with its preset, size and match worked out
match.py        expert width and count that equal a reference in compute, in parameters, or in both
resolve.py  presets (presets.py) by name: those of presets.py, at three sizes, and the papers' models of papers.py
sizes.py        parameters and multiply-adds           match.py    a model beside its reference
expert_step.py      routes that static routing drops by chance
expert_step.py         work and traffic of the expert step    memory.py    bytes that a rank holds
traffic.py      bytes that ranks exchange              traffic.py     and over which links
estimate.py     how long a step takes                  sizes.py     bytes of the numbers in all of these
sizes.py        what experts are measured by           sizes.py   arithmetic of accelerators that is used
expert_step.py       what auto is taken for
sweep/plan.py        the runs of a sweep, as whole specs
"""
