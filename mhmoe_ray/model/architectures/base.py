"""The interface between a model and its architecture: norms, feed-forward function, positions, initial weights. A
method has a default if most architectures agree on it, so that an architecture defines only the differences."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mhmoe_kernels import Function
from mhmoe_ray.spec import ModelSpec


class Modules(ABC):
    """Interface of an architecture: its norms, feed-forward function, scales, and changes to initial weights."""

    @abstractmethod
    def norm(self, spec: ModelSpec) -> nn.Module:
        """Return a new normalization layer over the width of the model."""

    def inner_norm(self, spec: ModelSpec) -> nn.Module:
        """Return a new normalization layer between attention and its output projection; by default the identity."""
        return nn.Identity()

    @abstractmethod
    def function(self, spec: ModelSpec) -> Function:
        """Return the function that a dense feed-forward layer or an expert computes."""

    @abstractmethod
    def expert_shapes(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a feed-forward layer's or expert's parameters by name, in the order of its function's
        arguments. Rows have width D, hidden rows width F."""

    def embedding_scale(self, spec: ModelSpec) -> float:
        """Return the factor by which token embeddings are multiplied; by default 1."""
        return 1.0

    def query_scale(self, head_width: int, position_T: Tensor) -> Tensor | None:
        """Return the factors (T, C), float64, that multiply rotated queries and divide rotated keys. Positions are
        float64. The default None stands for plain RoPE."""
        return None

    def rescale_initial(self, name: str, tensor: Tensor, layers: int) -> Tensor:
        """Return a tensor after the architecture's own changes to its initial values, which may be in place; by default
        none.

        Args:
            name: full name of the tensor in the model.
            tensor: parameter of one module or of one expert, as `model/init.py` has drawn it.
            layers: number of blocks of the model.
        """
        return tensor
