"""Modules of the subln architecture: LayerNorm also inside attention, GELU with biases and an inner norm, and xPos."""

import math

import torch
from torch import Tensor, nn

from mhmoe_kernels import Function, GeluSubln
from mhmoe_ray.model.architectures.base import Modules
from mhmoe_ray.spec import ModelSpec

XPOS_SCALE_BASE = 512
"""Positions over which xPos's scale of queries is multiplied once by its base (arXiv 2212.10554, as in torchscale)."""


class SublnModules(Modules):
    """Modules of the subln architecture (SubLN, arXiv 2210.06423)."""

    def norm(self, spec: ModelSpec) -> nn.Module:
        return nn.LayerNorm(spec.d_model, spec.norm_eps)

    def inner_norm(self, spec: ModelSpec) -> nn.Module:
        return nn.LayerNorm(spec.query_width, spec.norm_eps)

    def function(self, spec: ModelSpec) -> Function:
        return GeluSubln(spec.norm_eps)

    def expert_shapes(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        return {
            "fc1_FD": (hidden, width),
            "fc1_bias_F": (hidden,),
            "norm_weight_F": (hidden,),
            "norm_bias_F": (hidden,),
            "fc2_DF": (width, hidden),
            "fc2_bias_D": (width,),
        }

    def embedding_scale(self, spec: ModelSpec) -> float:
        return float(spec.d_model**0.5)

    def query_scale(self, head_width: int, position_T: Tensor) -> Tensor | None:
        """Return xPos's factors (T, C), by which products of queries and keys shrink with distance."""
        # 0.4 is xPos's constant gamma, with the value that the library torchscale uses.
        even = torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float64)
        base = (even + 0.4 * head_width) / (1.4 * head_width)
        return (base ** (position_T[:, None] / XPOS_SCALE_BASE)).repeat(1, 2)

    def rescale_initial(self, name: str, tensor: Tensor, layers: int) -> Tensor:
        """Multiply the weights and biases of fc1, fc2, attention's value and output projections and the merge
        projection by sqrt(ln(2 L)) for L layers, in place (SubLN, arXiv 2210.06423)."""
        factor = math.sqrt(math.log(2 * layers))
        if ".qkv." in name:
            # The rows of queries, keys and values are joined in this order, and all three have the same number of
            # heads. So the values are the last third.
            tensor[-len(tensor) // 3 :] *= factor
        # The code of arXiv 2404.15045 selects the tensors to rescale by name. That includes the merge projection after
        # the experts, but not the head projection before them.
        elif any(part in name for part in (".fc1_", ".fc2_", ".attention.out.", ".merge.")):
            tensor *= factor
        return tensor


MODULES = SublnModules()
