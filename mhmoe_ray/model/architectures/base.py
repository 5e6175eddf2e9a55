"""The interface between a model and its architecture. A method has a default if most architectures agree on it."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mhmoe_kernels import Function
from mhmoe_ray.spec import ModelSpec


class Modules(ABC):
    """Interface of an architecture's norms, feed-forward function, scales and initial weights."""

    @abstractmethod
    def norm(self, spec: ModelSpec) -> nn.Module:
        """Return a new norm over the width of the model."""

    def inner_norm(self, spec: ModelSpec) -> nn.Module:
        """Return a new norm between attention and its output projection; by default none."""
        return nn.Identity()

    @abstractmethod
    def function(self, spec: ModelSpec) -> Function:
        """Return the function of a dense feed-forward layer or an expert."""

    @abstractmethod
    def expert_shapes(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a feed-forward layer's or expert's parameters, in the order of its function's arguments,
        for widths D and F."""

    def embedding_scale(self, spec: ModelSpec) -> float:
        """Return the factor of token embeddings; by default 1."""
        return 1.0

    def query_scale(self, head_width: int, position_T: Tensor) -> Tensor | None:
        """Return factors (T, C), float64, that multiply rotated queries and divide rotated keys at float64 positions;
        None for plain RoPE."""
        return None

    def rescale_initial(self, name: str, tensor: Tensor, layers: int) -> Tensor:
        """Return a tensor that `model/init.py` has drawn, after the architecture's own changes, perhaps in place; by
        default there are none. `name` is its full name in the model, and `layers` the number of blocks."""
        return tensor
