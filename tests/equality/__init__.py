"""Comparison of two trees of this project for `tests/equal.py`, by their command line and their files.

A side is one of the two trees with the project folder and the cluster that it works with. A question is a command or
request to a side with a name; its answers are the side's observations.

    trees.py        the two trees: a commit in a worktree, and a copy of this working tree
    side.py         a side: its environment, its commands, its cluster
    stored.py       stored observations of a commit, for the next comparison with it
    specs.py        text, models and specs that both sides get
    commands.py     questions that need no cluster: help, plans, presets, and users' mistakes
    walk.py         all questions to a side, in order
    reading.py      files as values that can be compared
    normal.py       removal of what differs from call to call: times, process ids, names of runs
    differences.py  the first difference of two values
    site/           a `sitecustomize` that records from where processes import the project

Nothing of the project is imported here, so a module of the project may have different names in the two trees.
"""
