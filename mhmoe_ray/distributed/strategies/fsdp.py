"""FSDP2: each rank holds a shard of every tensor, and gathers the full tensors of a block while the block computes.

Experts stay distributed by expert parallelism, and may also be sharded over the ranks that hold the same ones. Shards
are float32. With `gather_precision: bfloat16`, operands of matrix products are gathered in bfloat16, to which autocast
would cast them anyway. Norms and routers compute in float32, so they are gathered in groups of their own. The inputs
and heads of vision models are gathered in float32, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.optimizer import expert_parameters
from mhmoe_ray.distributed.strategies.ddp import FillModel, Strategy
from mhmoe_ray.model.autocast import DTYPES
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.router import BaseRouter
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.planner.family import plan_of
from mhmoe_ray.spec import RunSpec


class FsdpStrategy(Strategy):
    """The strategy fsdp: FSDP2 shards all parameters, and experts too if requested."""

    holds_whole_weights = False
    keeps_root_gathered = True
    """Whether the root's own tensors stay gathered from forward to backward."""

    def __init__(self, model: Trunk, mesh: Mesh, spec: RunSpec, fill: FillModel) -> None:
        assert mesh.shard_mesh is not None
        self._shards_experts = spec.cluster.shard_experts and mesh.expert_dp > mesh.replicas
        self._reduce_dtype = DTYPES[spec.cluster.reduce_precision]
        self._gather_dtype = DTYPES[spec.cluster.gather_precision]
        super().__init__(model, mesh, spec, fill)

    def _wrap_model(self, fill: FillModel) -> nn.Module:
        units: list[FSDPModule] = []
        ignored_parameters = set() if self._shards_experts else set(expert_parameters(self.model).values())
        shard_mesh = self.mesh.shard_mesh
        for block in self.model.blocks:
            experts = [m for m in block.modules() if isinstance(m, Experts)] if self._shards_experts else []
            expert_units = [self._shard_experts(module) for module in experts]
            norms_and_router: list[nn.Module] = [
                m for m in block.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm | BaseRouter)
            ]
            float32_units = self._shard_in_float32(norms_and_router)
            block_unit = fully_shard(block, mesh=shard_mesh, ignored_params=ignored_parameters, mp_policy=self._policy)
            units += [block_unit, *float32_units, *expert_units]
        units += self._shard_in_float32(self.model.final_norms())
        self._units = units  # one module per group of parameters that is gathered together, in the order of the forward
        self._prefetch_in_forward(True)
        # Detectors and the norms of stems compute in float32, and are not called as modules, so FSDP2 cannot gather
        # them as groups of their own. They belong to the root's group, which is float32 for vision models.
        gathers_all = plan_of(self.model.spec).gathers_outside_in_float32
        root_policy = self._float32_policy if gathers_all else self._policy
        # By default FSDP2 leaves the root's own tensors gathered after a forward. They are sharded again, except in
        # `micro_batch_context`, so that code that reads weights between steps always sees shards.
        fully_shard(
            self.model,
            mesh=shard_mesh,
            reshard_after_forward=True,
            ignored_params=ignored_parameters,
            mp_policy=root_policy,
        )
        # The model is filled only after it was sharded, so that no rank ever holds the full tensors.
        fill(self.model)
        return self.model

    def _prefetch_in_forward(self, enabled: bool) -> None:
        """Set whether a unit's forward also gathers the next unit, as FSDP2 does by itself in the backward."""
        for unit, next_unit in pairwise(self._units):
            unit.set_modules_to_forward_prefetch([next_unit] if enabled else [])

    def backward(self, objective: Tensor) -> None:
        # A recomputed block runs its forward again in the backward. With prefetching, that would gather the block after
        # it, whose backward is done already, and which would then stay gathered until the whole backward ends.
        self._prefetch_in_forward(False)
        try:
            super().backward(objective)
        finally:
            self._prefetch_in_forward(True)

    @property
    def _policy(self) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(self._gather_dtype, self._reduce_dtype, cast_forward_inputs=False)

    @property
    def _float32_policy(self) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(torch.float32, self._reduce_dtype, cast_forward_inputs=False)

    def _shard_in_float32(self, modules: list[nn.Module]) -> list[FSDPModule]:
        """Shard float32 modules as one group, and return its first module, or none if all weights are gathered in
        float32."""
        if self._gather_dtype == torch.float32:
            return []
        return fully_shard(modules, mesh=self.mesh.shard_mesh, mp_policy=self._float32_policy)[:1]

    def _shard_experts(self, module: Experts) -> FSDPModule:
        """Shard a layer's experts over the ranks that hold the same ones, as DTensors over `Mesh.expert_mesh`."""
        mesh = self.mesh.expert_mesh
        assert mesh is not None
        for name, parameter in list(module.named_parameters()):
            expert_shard = DTensor.from_local(parameter.data, mesh["ep"], [Shard(0)], run_check=False)
            module.register_parameter(name, nn.Parameter(expert_shard, parameter.requires_grad))
        assert mesh.mesh_dim_names is not None
        sharded_module = fully_shard(module, mesh=mesh[mesh.mesh_dim_names[:-1]], mp_policy=self._policy)
        # By default FSDP2 would divide the gradients of experts by the data-parallel size only, which makes them too
        # large by the expert-parallel size. So they are summed and then divided by the world size.
        sharded_module.set_force_sum_reduction_for_comms(True)
        sharded_module.set_gradient_divide_factor(self.mesh.world_size)
        return sharded_module

    @contextmanager
    def micro_batch_context(self, is_last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(is_last or self.spec.cluster.reduce_after == "micro_batch")
        self._expert_reduction.is_last_backward = is_last
        # The backward begins with the root's own tensors, so they stay gathered. A validation has no backward, after
        # which FSDP2 would shard them again.
        self.module.set_reshard_after_forward(not self.keeps_root_gathered, recurse=False)
        try:
            yield
        finally:
            self.module.set_reshard_after_forward(True, recurse=False)

    def _to_global(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        global_tensors = super()._to_global({name: t for name, t in local.items() if not isinstance(t, DTensor)})
        return {name: global_tensors.get(name, t) for name, t in local.items()}
