"""Modules and initialization of the architectures in `mhmoe_ray/architectures/`, each in a file of the same name.

base.py     the interface of an architecture's modules
llama.py    RMSNorm, rotary positions and SwiGLU (arXiv 2411.16205)
vit.py      LayerNorm and GELU, for vision models alone (arXiv 2010.11929)
subln.py    LayerNorm also inside attention and feed-forward, xPos and GELU (arXiv 2404.15045)
"""

from importlib import import_module

from mhmoe_ray.model.architectures.base import Modules
from mhmoe_ray.spec import ModelSpec

__all__ = ["Modules", "modules_of"]


def modules_of(spec: ModelSpec) -> Modules:
    """Return the `Modules` of the architecture `spec.backbone`."""
    modules: Modules = import_module(f"{__name__}.{spec.backbone}").MODULES
    return modules
