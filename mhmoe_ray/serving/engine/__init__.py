"""Engines, which compute the answers to many requests at once; those of decoders take and return token ids.

request.py        requests, updates, sampling parameters and statistics; the interface of all engines
background.py     base class of all engines: their thread and its lock, statistics, failure and closing
threaded.py       base class of engines of decoders, which deliver an answer in several updates
round_engine.py   base class of engines of encoders and vision models, which give one answer to each input
torch_engine.py   this project's own engine for decoders
packed_model.py   the model of that engine with matrices packed for inference on a CPU
fair_queue.py     turns of clients by the tokens that they got, and the queue of waiting requests
scheduler.py      continuous batching: chooses the tokens that the next step computes
block_pool.py     KV-cache blocks: reference counts, a free list, and prefix caching by block hash
paged_cache.py    the KV cache itself, and the decoder's view of it in one step
sampler.py        samples the next token from logits
"""

from mhmoe_ray.serving.engine.request import (
    AnswerUpdate,
    BusyError,
    Engine,
    EngineError,
    FinishReason,
    Request,
    ScoredToken,
    ServedEngine,
    ServedWeights,
    Stats,
    Structure,
    Structures,
    TextEngine,
    TokenRoutes,
)
from mhmoe_ray.serving.sampling import SamplingParams

__all__ = [
    "AnswerUpdate",
    "BusyError",
    "Engine",
    "EngineError",
    "FinishReason",
    "Request",
    "SamplingParams",
    "ScoredToken",
    "ServedEngine",
    "ServedWeights",
    "Stats",
    "Structure",
    "Structures",
    "TextEngine",
    "TokenRoutes",
]
