import torch
import torch.nn.functional as F

from mhmoe_ray.model.feedforward import Experts, FeedForward
from mhmoe_ray.spec import ModelSpec, MoESpec


@torch.no_grad()
def test_the_inner_norm_of_dense_layers_and_experts_has_the_models_epsilon():
    moe = MoESpec(heads=2, experts=2, top_k=1, d_expert=6)
    shape = {"vocab_size": 8, "d_model": 16, "layers": 2, "attention_heads": 2, "d_ff": 6}
    spec = ModelSpec(backbone="subln", norm_eps=0.5, **shape, moe=moe)
    dense, experts = FeedForward(spec, 6).double(), Experts(spec, range(2)).double()
    g = torch.Generator().manual_seed(0)
    for p in (*dense.parameters(), *experts.parameters()):
        torch.nn.init.normal_(p, generator=g)

    def formula(x, fc1, bias1, scale, shift, fc2, bias2):
        hidden = F.gelu(x @ fc1.T + bias1)
        centred = hidden - hidden.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
        return (normed * scale + shift) @ fc2.T + bias2

    x, y = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(dense(x), formula(x, *dense.parameters()))
    gate_N1 = torch.ones(3, 1, dtype=torch.float64)
    second = [p[1] for p in experts.parameters()]
    torch.testing.assert_close(experts.compute(y, torch.ones(3, 1, dtype=torch.int64), gate_N1), formula(y, *second))
