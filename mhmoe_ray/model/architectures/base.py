"""The interface between a model and its architecture: norms, feed-forward function, positions, initial weights.

A method has a default if most architectures agree on it, so that an architecture defines only the differences.
"""

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
        """Return the shapes of the parameters of a feed-forward layer or an expert by name, in the order of its
        function's arguments.

        Args:
            width: D, the width of the rows that the layer takes and returns.
            hidden: F, the hidden width of the layer.
        """

    def embedding_scale(self, spec: ModelSpec) -> float:
        """Return the factor by which token embeddings are multiplied; by default 1."""
        return 1.0

    def query_scale(self, head_width: int, position_T: Tensor) -> Tensor | None:
        """Return the factors by which rotated queries are multiplied and rotated keys are divided; None, the default,
        for plain RoPE.

        Args:
            head_width: C, the width of an attention head.
            position_T: positions of T tokens, float64.

        Returns:
            The factors (T, C), float64.
        """
        return None

    def rescale_initial(self, name: str, tensor: Tensor, layers: int) -> Tensor:
        """Apply the architecture's own changes to an initial weight or bias and return it; by default it is unchanged.

        The method may change the tensor in place.

        Args:
            name: full name of the tensor in the model.
            tensor: parameter of one module or of one expert, as `model/init.py` has drawn it.
            layers: number of blocks of the model.
        """
        return tensor
