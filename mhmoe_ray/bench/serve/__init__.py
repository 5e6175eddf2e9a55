"""Throughput of serving: inference engines without HTTP, servers, and models of equal work, beside other packages.

model.py      a plain model, and a run with random weights
engines.py    engines in this process: our own, vLLM with our model, vLLM with its own, transformers' generate
servers.py    engines behind HTTP: without Ray, through Ray Serve, and vLLM's own server
child.py      process of an engine or a server, which waits while the others are measured
load.py       clients: a fixed number at a time (closed loop), or random arrivals (open loop)
contest.py    interleaved rounds of all engines or servers
"""
