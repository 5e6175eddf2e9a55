"""Engines: token ids in, token ids out, for many requests at once.

request.py        what one is asked, what it answers and what it counts; the interface of all engines
threaded.py       what engines have in common: a thread that computes round after round
torch_engine.py   our own: a thread that computes step after step
packed_model.py   its model with matrices packed for inference on a CPU
scheduler.py      which tokens of which requests come next, and whose turn it is
block_pool.py     whose keys and values are in which block of the cache, and which prompts began alike
paged_cache.py    the cache itself, and the decoder's view of it in one step
sampler.py        the next token from logits
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
