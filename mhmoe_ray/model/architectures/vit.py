"""Modules of the vit architecture: LayerNorm, and GELU with biases; `base.py` provides the rest."""

from torch import Tensor, nn

from mhmoe_kernels import Function, Gelu
from mhmoe_ray.model.architectures.base import Modules
from mhmoe_ray.spec import ModelSpec


class VitModules(Modules):
    """Modules of the vit architecture (ViT, arXiv 2010.11929)."""

    def norm(self, spec: ModelSpec) -> nn.Module:
        return nn.LayerNorm(spec.d_model, spec.norm_eps)

    def function(self, spec: ModelSpec) -> Function:
        return Gelu()

    def expert_shapes(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        return {"fc1_FD": (hidden, width), "fc1_bias_F": (hidden,), "fc2_DF": (width, hidden), "fc2_bias_D": (width,)}

    def rescale_initial(self, name: str, tensor: Tensor, layers: int) -> Tensor:
        """Give feed-forward layers and experts Xavier's uniform distribution and biases of 0, in place."""
        # AdaMV-MoE's biases have a deviation of 1e-6.
        if any(part in name for part in (".fc1_", ".fc2_")):
            tensor *= (6 * tensor.shape[1] / sum(tensor.shape)) ** 0.5 if tensor.ndim == 2 else 0
        return tensor


MODULES = VitModules()
