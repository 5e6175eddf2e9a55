"""Comparison of two trees of this project for `tests/equal.py`, driven by their command line and seen in their files.

    trees.py        the two trees: a commit in a worktree, and a copy of the files of this one
    side.py         a tree at work: its environment, its commands, its cluster
    stored.py       the observations of a commit, for the next comparison with it
    specs.py        text, models and specs that both sides are given
    commands.py     questions that need no cluster: help, plans, presets, and users' mistakes
    walk.py         all questions to a side, in order, and the observations of it
    reading.py      files as values that can be compared
    normal.py       values without the parts that differ from call to call: times, process ids, names of runs
    differences.py  the first difference of two values
    site/           a `sitecustomize` that records from where processes import the project

Nothing of the project is imported here, so that modules may be called anything on either side.
"""
