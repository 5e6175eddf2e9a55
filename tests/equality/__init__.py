"""What `tests/equal.py` compares: two trees of this project, driven by their command line and seen in their files.

    trees.py        the two trees: a commit in a worktree, and a copy of the files of this one
    side.py         a tree at work: its environment, its commands, its cluster
    stored.py       what was seen of a commit, for the next comparison with it
    specs.py        text, models and specs that both are given
    commands.py     what is asked without a cluster: help, plans, presets, and users' mistakes
    walk.py         all that a side is asked, in order, and what is seen of it
    reading.py      files as values that can be compared
    normal.py       values without what differs from call to call: times, process ids, names of runs
    differences.py  the first difference of two values
    site/           a `sitecustomize` that records from where processes import the project

Nothing of the project is imported here, so that modules may be called anything on either side.
"""
