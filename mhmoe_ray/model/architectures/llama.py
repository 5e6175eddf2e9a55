"""Modules of the llama architecture: RMSNorm and SwiGLU; `base.py` provides the rest."""

from torch import nn

from mhmoe_kernels import Function, Swiglu
from mhmoe_ray.model.architectures.base import Modules
from mhmoe_ray.spec import ModelSpec


class LlamaModules(Modules):
    """Modules of the llama architecture."""

    def norm(self, spec: ModelSpec) -> nn.Module:
        return nn.RMSNorm(spec.d_model, spec.norm_eps)

    def function(self, spec: ModelSpec) -> Function:
        return Swiglu()

    def expert_shapes(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        return {"gate_FD": (hidden, width), "up_FD": (hidden, width), "down_DF": (width, hidden)}


MODULES = LlamaModules()
