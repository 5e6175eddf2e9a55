"""Answers a second: of engines alone, behind HTTP, and of models that are matched; beside what other packages give.

model.py      a plain model, and a run with random weights
engines.py    engines in a process: our own, vLLM with our model, vLLM with its own, transformers' generate
servers.py    the same behind HTTP: alone, through Ray Serve, and vLLM's own server
child.py      each of these in a process of its own, which waits while others are measured
load.py       clients: so many at a time (closed loop), or as they happen to come (open loop)
contest.py    all of them in turn
"""
