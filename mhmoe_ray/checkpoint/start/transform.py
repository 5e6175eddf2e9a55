"""Weights of one layer at the start of a run: copied, upcycled, or mixed.

    target tensor             from a dense layer                        from a sparse mixture (h = 1)
    -----------------------   ---------------------------------------   --------------------------------------------
    attention, norms, ffn     the same tensor                           the same tensor
    experts, h = 1            copies of ffn (mix: ffn of each model)    does not occur
    shared expert             ffn                                       the same tensor
    experts, h > 1            initial values                            the same tensors; a sub-token is as wide as a
                                                                        token of the start model
    router                    initial values                            the same tensor
    head projection           initial values                            identity for the first sub-token, initial
                                                                        values for the others
    merge projection          zero                                      identity for the first sub-token, zero for the
                                                                        others

The table is for the values `upcycle` and `mix` of `start.how`; `copy` keeps the tensors as they are, but can add, leave
out and reorder experts of router `domain`. "ffn" is a dense feed-forward layer, and "initial values" are those of a
model that is trained from scratch.

With these weights, an upcycled model has the same logits as the model that it starts from (sparse upcycling, arXiv
2212.05055). The reason is that equal experts whose gates add up to 1 compute the same as one of them, and that a merge
projection of zero adds nothing to the shared expert. If several start models have a tensor that is not an expert's, its
mean over the models is taken in float64 (Branch-Train-MiX, arXiv 2403.07816).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mhmoe_ray.model.init import initial_tensor
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import ModelSpec

_EXPERTS = re.compile(r"(blocks\.\d+)\.moe\.experts\.(.+)_E(\w+)")
_SHARED = re.compile(r"(blocks\.\d+)\.moe\.shared\.(.+)")
# In a projection with several linear layers, each layer has an even index, because ReLUs lie between them.
_PROJECTION = re.compile(r"blocks\.\d+\.moe\.(?P<part>head|merge)\.(?:(?P<index>\d+)\.)?(?P<kind>weight|bias)")


class StartTransform:
    """Computation of a new model's first weights from those of its start models, tensor by tensor."""

    def __init__(
        self, model: Trunk, start_model: Trunk, seed: int, new_experts: Mapping[str, str] | None = None
    ) -> None:
        """Prepare the transformation from the names and shapes of both models on the meta device.

        Several start models have the same shapes, so `start_model` is any of them. `seed` is for random initial values.
        `new_experts` maps new experts of router `domain` to the old experts that they copy.
        """
        self._model, self._seed = model, seed
        self._shapes = {name: t.shape for name, t in model.named_tensors().items()}
        self._start_names = set(start_model.named_tensors())
        self._is_dense_start = not start_model.moe_layers()
        self._shared_layers = {match[1] for name in self._shapes if (match := _SHARED.fullmatch(name))}
        """Names of the layers with a shared expert, which a dense start model's dense layer becomes."""
        self._old_experts = _old_experts(model.spec, start_model.spec, new_experts or {})
        self._projection_layers = model.spec.moe.projection_layers if model.spec.moe else 0

    def source_name(self, name: str) -> str | None:
        """Return the name of the start model's tensor from which a new tensor is made; None without one."""
        if name in self._start_names:
            return name
        if match := _SHARED.fullmatch(name):
            ffn_name = f"{match[1]}.ffn.{match[2]}"
        elif (match := _EXPERTS.fullmatch(name)) and match[1] not in self._shared_layers:
            # The tensor gate_EFD of the experts stacks a matrix gate_FD per expert. It is made from the dense layer's
            # matrix gate_FD.
            ffn_name = f"{match[1]}.ffn.{match[2]}_{match[3]}"
        else:
            return None
        return ffn_name if ffn_name in self._start_names else None

    def tensor(self, name: str, sources: Sequence[Tensor]) -> Tensor:
        """Return the values of a tensor at step 0 from tensor `source_name(name)` of each start model."""
        if self._old_experts is not None and _EXPERTS.fullmatch(name):
            [tensor_E] = sources
            experts = [_mean(list(tensor_E)) if number is None else tensor_E[number] for number in self._old_experts]
            return torch.stack(experts)
        if sources and name not in self._start_names and _EXPERTS.fullmatch(name):
            experts = list(sources) if len(sources) > 1 else list(sources) * self._shapes[name][0]
            return torch.stack(experts)
        if sources:
            return _mean(sources)
        if match := _PROJECTION.fullmatch(name):
            is_weight = match["kind"] == "weight"
            if not self._is_dense_start:
                return self._identity_projection(name, is_head=match["part"] == "head", is_weight=is_weight)
            if match["part"] == "merge" and int(match["index"] or 0) == 2 * (self._projection_layers - 1):
                return torch.zeros(self._shapes[name])
        return initial_tensor(self._model, name, self._seed)

    def _identity_projection(self, name: str, *, is_head: bool, is_weight: bool) -> Tensor:
        """Return a projection's initial weight or bias with which the experts compute on whole tokens.

        The head projection makes the first sub-token equal to the token; the merge projection returns only this
        sub-token.
        """
        width = self._model.spec.d_model
        if is_head:
            tensor = initial_tensor(self._model, name, self._seed)
            tensor[:width] = torch.eye(width) if is_weight else 0.0
            return tensor
        tensor = torch.zeros(self._shapes[name])
        if is_weight:
            tensor[:, :width] = torch.eye(width)
        return tensor


def _old_experts(spec: ModelSpec, start_spec: ModelSpec, new_experts: Mapping[str, str]) -> list[int | None] | None:
    """Return the index of the old expert that each expert copies, or None for the mean of all old experts.

    The result is None unless both models have router `domain`.
    """
    moe, start_moe = spec.moe, start_spec.moe
    if moe is None or start_moe is None or moe.domains is None or start_moe.domains is None:
        return None
    old_numbers = {name: number for number, name in enumerate(start_moe.domains)}
    return [old_numbers.get(name, old_numbers.get(new_experts.get(name, ""))) for name in moe.domains]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors in their dtype, computed in float64; a single tensor is returned unchanged."""
    if len(tensors) == 1:
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)
