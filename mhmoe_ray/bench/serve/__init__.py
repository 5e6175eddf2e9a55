"""Throughput of serving: engines alone, behind HTTP, and matched models, beside the figures of other packages.

model.py      a plain model, and a run with random weights
engines.py    engines in a process: our own, vLLM with our model, vLLM with its own, transformers' generate
servers.py    the same behind HTTP: alone, through Ray Serve, and vLLM's own server
child.py      each of these in a process of its own, which waits while others are measured
load.py       clients: a fixed number at a time (closed loop), or random arrivals (open loop)
contest.py    interleaved rounds of all of them
"""
