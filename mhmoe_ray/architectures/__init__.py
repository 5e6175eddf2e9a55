"""Transformer architectures without their modules: options, counts of parameters and bytes, and Hugging Face names.

An architecture has two files of the same name: one here without torch, for the spec and the planner, and one in
`model/architectures/` with modules and initialization. `tests/test_architectures.py` compares the counts with the built
model.

    base.py     the interface of an architecture
    llama.py    RMSNorm, rotary positions and SwiGLU (the models of arXiv 2411.16205)
    vit.py      LayerNorm and GELU, for vision models alone (arXiv 2010.11929)
    subln.py    LayerNorm also inside attention and feed-forward, xPos and GELU (the models of arXiv 2404.15045)
"""

from typing import TYPE_CHECKING, Literal

from mhmoe_ray.architectures.base import FLOAT32, Architecture
from mhmoe_ray.architectures.llama import Llama
from mhmoe_ray.architectures.subln import Subln
from mhmoe_ray.architectures.vit import Vit

ARCHITECTURES: dict[str, Architecture] = {"llama": Llama(), "subln": Subln(), "vit": Vit()}
"""All architectures by their name in a spec (`model.backbone`)."""
if TYPE_CHECKING:
    ArchitectureName = str
else:
    ArchitectureName = Literal[tuple(ARCHITECTURES)]

__all__ = ["ARCHITECTURES", "FLOAT32", "Architecture", "ArchitectureName"]
