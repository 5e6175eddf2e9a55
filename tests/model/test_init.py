import math

import torch

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from tests.specs import tiny_spec


def weights(seed=0, held=None):
    model = Decoder(tiny_spec().model, held)
    init_weights(model, seed)
    return dict(model.named_parameters())


def test_a_rank_with_some_experts_gets_the_same_weights_as_a_process_with_all():
    everything, half = weights(), weights(held=range(2, 4))
    for name, tensor in half.items():
        whole = everything[name]
        assert torch.equal(tensor, whole[2:4] if ".experts." in name else whole), name


def test_another_seed_gives_other_weights_and_no_two_experts_are_equal():
    a, b = weights(0), weights(1)
    random = [name for name in a if "norm" not in name and not name.endswith("merge.bias")]
    assert not any(torch.equal(a[name], b[name]) for name in random)
    experts = a["blocks.1.moe.experts.up_EFD"]
    assert len({tuple(e.flatten().tolist()) for e in experts}) == 4


def test_head_and_merge_projections_start_as_the_authors_do():
    w = weights()
    bound = math.sqrt(6 / 64)  # Xavier for 32 x 32
    assert 0.95 * bound < w["blocks.1.moe.merge.weight"].abs().max() <= bound
    assert 0.95 * bound < w["blocks.1.moe.head.weight"].abs().max() * math.sqrt(2) <= bound
    assert not w["blocks.1.moe.merge.bias"].any()
    assert 0 < w["blocks.1.moe.head.bias"].abs().max() <= 32**-0.5
