"""FSDP2: each rank holds a shard of every tensor and gathers a block's whole tensors while the block computes.

Experts stay as expert parallelism has them, or are sharded once more over the dp ranks that hold the same ones. By
default FSDP2 averages their gradients over dp, which would make them ep times too large: instead they are summed, and
divided by the number of all ranks.
"""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.optimizer import expert_parameters
from mhmoe_ray.distributed.strategies.ddp import Fill, Strategy
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.spec import TrainSpec


class Sharded(Strategy):
    def __init__(self, model: Decoder, mesh: Mesh, spec: TrainSpec, fill: Fill, experts: bool) -> None:
        """Fill and shard the model, and build the optimizer, as `Strategy` does.

        Args:
            model: model on the meta device.
            mesh: mesh of this rank.
            spec: `train` section of the spec.
            fill: function that gives the model its memory and weights; called once.
            experts: whether to shard experts over dp too.
        """
        self._experts = experts and mesh.size("dp") > 1
        super().__init__(model, mesh, spec, fill)

    def _wrapped(self, fill: Fill) -> nn.Module:
        experts = [m for m in self.model.modules() if isinstance(m, Experts)]
        if self._experts:
            for module in experts:
                self._slice_experts(module)
        apart = set() if self._experts else set(expert_parameters(self.model).values())
        everyone = self.mesh.everyone
        for block in self.model.blocks:
            fully_shard(block, mesh=everyone, ignored_params=apart)
        # Also the root's own tensors after each forward, so that what is read between steps is slices always.
        fully_shard(self.model, mesh=everyone, reshard_after_forward=True, ignored_params=apart)
        fill(self.model)  # no rank ever has the whole
        return self.model

    def _slice_experts(self, module: Experts) -> None:
        assert self.mesh.devices is not None
        for name, parameter in list(module.named_parameters()):
            held = DTensor.from_local(parameter.data, self.mesh.devices["ep"], [Shard(0)], run_check=False)
            module.register_parameter(name, nn.Parameter(held))
        sliced = fully_shard(module, mesh=self.mesh.devices["dp"])
        sliced.set_force_sum_reduction_for_comms(True)
        sliced.set_gradient_divide_factor(self.mesh.world)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def _as_global(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = super()._as_global({name: t for name, t in local.items() if not isinstance(t, DTensor)})
        return {name: whole.get(name, t) for name, t in local.items()}
