"""Small decoders with random weights, and tokens for them."""

import torch

from mhmoe_ray.architectures import ARCHITECTURES
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.support.specs import tiny_spec

BACKBONES = [name for name, architecture in ARCHITECTURES.items() if architecture.reads_tokens]
"""Architectures that a decoder can have."""
KINDS = [{}, {"backbone": "subln"}, {"kv_heads": 2, "tied_embeddings": False}]
DOMAIN_MOE = {
    "router": "domain",
    "domains": ["web", "code", "web/de"],
    "experts": 3,
    "top_k": 1,
    "heads": 1,
    "d_expert": 48,
}


def build_decoder(heads=2, seed=0, moe=None, **model):
    """Return a float64 decoder with four layers and random weights; `moe` has keys of MoESpec, `model` of ModelSpec."""
    moe = MoESpec(**{"heads": heads, "experts": 6, "top_k": 2, "d_expert": 12, **(moe or {})})
    spec = ModelSpec(vocab_size=50, d_model=32, layers=4, attention_heads=4, d_ff=40, moe=moe, **model)
    decoder = Decoder(spec)
    init_weights(decoder, seed)
    return decoder.double()


def random_tokens(batch, length, seed=0):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_domain_model(**moe) -> Decoder:
    spec = ModelSpec.model_validate({**tiny_spec().model.model_dump(), "moe": {**DOMAIN_MOE, **moe}})
    model = Decoder(spec)
    init_weights(model, seed=1)
    return model
