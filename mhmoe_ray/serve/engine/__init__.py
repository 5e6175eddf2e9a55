"""Engines: token ids in, token ids out, for many requests at once.

request.py        what one is asked and answers; the interface of all engines
stats.py          what it counts
threaded.py       what engines have in common: a thread that computes round after round
torch_engine.py   our own: a thread that computes step after step
schedule.py       which tokens of which requests come next
turns.py          whose turn it is among clients that wait
blocks.py         whose keys and values are in which block of the cache, and which prompts began alike
paged.py          the cache itself, and the decoder's view of it in one step
sampling.py       the next token from logits
"""

from mhmoe_ray.serve.engine.request import (
    BusyError,
    Engine,
    EngineError,
    FinishReason,
    Request,
    Sampling,
    Scored,
    Update,
)
from mhmoe_ray.serve.engine.stats import Stats

__all__ = [
    "BusyError",
    "Engine",
    "EngineError",
    "FinishReason",
    "Request",
    "Sampling",
    "Scored",
    "Stats",
    "Update",
]
