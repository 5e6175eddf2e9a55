"""Computation inside an autograd function with an autograd graph of its own. A dispatch contains several such passes in
its autograd function, so that it can choose their order even in the backward."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mhmoe_kernels import Function
from mhmoe_ray.model.feedforward import SharedExpert
from mhmoe_ray.model.parts import mark
from mhmoe_ray.planner.parts import SHARED_EXPERT


class InnerPass:
    """Forward and backward of a function (x, *weights) -> y, inside an outer autograd function.

    The outer function saves the tensors that the backward needs, so that activation checkpointing of a block can free
    them after the forward and compute them again.
    """

    def __init__(self, function: Callable[..., Tensor], weights: Iterable[Tensor], differentiable: bool) -> None:
        self._function, self._weights, self._differentiable = function, tuple(weights), differentiable
        # The graph's hooks refer to this list and not to this object. The object holds the graph, so together they
        # would be a cycle through C++, which Python cannot collect.
        self._saved_tensors: list[Tensor] = []
        self.saved_count = 0
        self.dweights: tuple[Tensor | None, ...] = ()  # gradients of weights after the backward, None of frozen ones

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to rows; if there will be a backward, record the graph."""
        if not self._differentiable:
            return self._function(x, *self._weights)
        saved_tensors = self._saved_tensors

        def save(tensor: Tensor) -> int:
            saved_tensors.append(tensor)
            return len(saved_tensors) - 1

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, saved_tensors.__getitem__):
            anchor = torch.empty(0, device=x.device, requires_grad=True)
            self._trained = [w.requires_grad for w in self._weights]
            x, *started_weights = _start_graph(anchor, x, *(w for w in self._weights if w.requires_grad))
            self._input_edges = [get_gradient_edge(t) for t in (x, *started_weights)]
            trained_weights = iter(started_weights)
            y = self._function(x, *(next(trained_weights) if w.requires_grad else w for w in self._weights))
        # The backward needs only the gradient edge. A reference to y would keep values in memory that nothing reads.
        self._edge = get_gradient_edge(y)
        return y.detach()

    def take_saved(self) -> list[Tensor]:
        """Return the tensors that the backward needs, and drop the references to them."""
        saved_tensors = self._saved_tensors.copy()
        self._saved_tensors.clear()
        self.saved_count = len(saved_tensors)
        # The weights are among the saved tensors if the backward needs them.
        del self._function, self._weights
        return saved_tensors

    def restore_saved(self, saved_tensors: Iterable[Tensor]) -> None:
        """Take back what `take_saved` returned, for the backward."""
        self._saved_tensors.extend(saved_tensors)

    def backward(self, dy: Tensor) -> Tensor:
        """Return the gradient of the rows, after `restore_saved`."""
        dx, *dweights = torch.autograd.grad(self._edge, self._input_edges, dy)
        gradients = iter(dweights)
        self.dweights = tuple(next(gradients) if is_trained else None for is_trained in self._trained)
        self._saved_tensors.clear()
        return dx


def shared_arguments(shared: SharedExpert | None) -> tuple[Function | None, tuple[Tensor, ...]]:
    """Return the shared expert's function, and its tokens and weights, cast as autocast would; (None, ()) without
    one."""
    return (None, ()) if shared is None else (shared.layer.function, shared.layer.cast(shared.x_BTM))


class SharedPass:
    """Pass of tokens through the shared expert of a layer, if any."""

    def __init__(self, function: Function | None, tensors: Sequence[Tensor], differentiable: bool) -> None:
        self._inputs = list(tensors[:1])
        self.passes = [] if function is None else [InnerPass(function, tensors[1:], differentiable)]
        self.gradients: list[Tensor | None] = []  # of the tokens and weights, after the backward

    def forward(self) -> list[Tensor]:
        """Return the shared expert's output in a list, which is empty without one."""
        # Keeping the output here would form a reference cycle: the output's graph refers to the outer function, which
        # refers to this pass.
        outputs = []
        for inner_pass in self.passes:
            with mark(SHARED_EXPERT):
                outputs.append(inner_pass.forward(self._inputs.pop()))
        return outputs

    def backward(self, doutputs: Sequence[Tensor]) -> None:
        """Compute `gradients` from the gradients of the outputs."""
        for inner_pass, dy in zip(self.passes, doutputs, strict=True):
            with mark(SHARED_EXPERT):
                self.gradients = [inner_pass.backward(dy), *inner_pass.dweights]


def take_all_saved(passes: Iterable[InnerPass]) -> list[Tensor]:
    """Return the tensors that all backwards need, for the outer function to save."""
    return [tensor for inner_pass in passes for tensor in inner_pass.take_saved()]


def restore_saved(passes: Iterable[InnerPass], saved_tensors: list[Tensor]) -> None:
    """Give each pass what `take_all_saved` returned; the list is empty afterwards."""
    for inner_pass in passes:
        inner_pass.restore_saved(saved_tensors[: inner_pass.saved_count])
        del saved_tensors[: inner_pass.saved_count]


class _StartGraph(torch.autograd.Function):
    """Autograd function that makes inputs no leaves, which would stay in memory as long as the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(gradients))


_start_graph: Callable[..., tuple[Tensor, ...]] = _StartGraph.apply
