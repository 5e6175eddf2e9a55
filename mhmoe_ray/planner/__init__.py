"""From what a user wrote to a whole spec and its numbers, by arithmetic alone: nothing is built, torch is not imported.

resolve.py      a spec file with its preset, size and match worked out
match.py        expert width and count that equal a reference in compute, in parameters, or in both
find_preset.py  presets (preset.py) by name: those of families.py, at three sizes, and the papers' models of papers.py
sizes.py        parameters and multiply-adds           parity.py    a model beside its reference
dropped.py      routes that static routing drops by chance
step.py         work and traffic of the expert step    memory.py    bytes that a rank holds
traffic.py      bytes that ranks exchange              links.py     and over which links
estimate.py     how long a step takes                  units.py     bytes of the numbers in all of these
width.py        what experts are measured by           utilisation.py   arithmetic of accelerators that is used
kernel.py       what auto is taken for
sweep.py        the runs of a sweep, as whole specs
"""
