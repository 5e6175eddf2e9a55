"""Engines: token ids in, token ids out, for many requests at once.

request.py        what one is asked and answers; the interface of all engines
request.py          what it counts
threaded.py       what engines have in common: a thread that computes round after round
torch_engine.py   our own: a thread that computes step after step
scheduler.py       which tokens of which requests come next
scheduler.py          whose turn it is among clients that wait
block_pool.py         whose keys and values are in which block of the cache, and which prompts began alike
paged_cache.py          the cache itself, and the decoder's view of it in one step
sampler.py       the next token from logits
"""

from mhmoe_ray.serve.engine.request import (
    BusyError,
    Engine,
    EngineError,
    FinishReason,
    Request,
    Sampling,
    Scored,
    Stats,
    Update,
)

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
