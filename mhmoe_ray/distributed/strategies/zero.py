"""DeepSpeed's ZeRO on the existing process groups: stage 1 shards the optimizer's state over ranks, stage 2 also
gradients, stage 3 also weights.

Experts that expert parallelism spreads are an optimizer group of their own, sharded over the dp ranks that hold the
same ones. DeepSpeed recognizes experts by the class of their layer and by two attributes of each parameter, and their
process groups by name. It divides sums over a smaller group by the size of the whole world, which is what experts need.

DeepSpeed's own functions gather tensors for a checkpoint and shard them when it is loaded.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.optimizer import build_optimizer, expert_parameters, set_learning_rate
from mhmoe_ray.distributed.strategies.ddp import MOMENTS, Fill, Strategy
from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.held import local
from mhmoe_ray.spec import TrainSpec


class Zero(Strategy):
    gathers = True

    def __init__(self, model: Decoder, mesh: Mesh, spec: TrainSpec, fill: Fill, stage: int) -> None:
        """Fill the model and give it to a DeepSpeed engine, with the same arguments as `Strategy` and the stage.

        Args:
            model: model on the meta device.
            mesh: mesh of this rank.
            spec: `train` section of the spec.
            fill: function that gives the model its memory and weights; called once.
            stage: stage of ZeRO, 1 to 3.

        Raises:
            SpecError: DeepSpeed is not installed.
        """
        try:
            import deepspeed
        except ImportError as error:
            why = f"DeepSpeed is not installed ({error})"
            raise SpecError(f"cluster.strategy zero{stage}", why, "pip install 'mhmoe-ray[deepspeed]'") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("LOCAL_RANK", "0")  # which it wants from a launcher; devices are chosen already
        self.model, self.mesh, self.spec = model, mesh, spec
        self._stage = stage
        fill(model)
        self._experts = expert_parameters(model) if mesh.size("ep") > 1 else {}
        module: nn.Module = model
        if self._experts:
            self._introduce_experts()
            module = _with_marker(model)
        self.optimizer = build_optimizer(model, spec)
        mine = {id(p) for p in self._experts.values()}
        for group in self.optimizer.param_groups:
            if any(id(p) in mine for p in group["params"]):
                group |= {"moe": True, "name": self._group_name}
        config = {
            "train_micro_batch_size_per_gpu": spec.micro_batch_size,
            "gradient_accumulation_steps": spec.micro_batches // mesh.world,
            "gradient_clipping": spec.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "reduce_scatter": True,
                # Each slice to its rank; by default all of them to all ranks, which is twice as much.
                "use_multi_rank_bucket_allreduce": False,
                **_gathered(model),
            },
        }
        if spec.precision == "bfloat16":
            # On CUDA its forward switches autocast off unless it is told so. Without modules of its own choice, whose
            # gradients it would reduce in bfloat16.
            half = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            config["torch_autocast"] = half
        _compile_nothing()
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self.module = self.engine
        self._make_moments()

    @property
    def _group_name(self) -> str:
        return f"ep_size_{self.mesh.size('ep')}"

    def _introduce_experts(self) -> None:
        from deepspeed.utils import groups

        mesh, devices = self.mesh, self.mesh.devices
        assert devices is not None
        for parameter in self._experts.values():
            parameter.allreduce = False  # type: ignore[attr-defined]  # where DeepSpeed looks for it
            parameter.group_name = self._group_name  # type: ignore[attr-defined]  # the same
        groups._EXPERT_PARALLEL_GROUP[self._group_name] = mesh.group("ep")
        groups._EXPERT_PARALLEL_GROUP_RANKS[self._group_name] = next(g for g in mesh.groups if mesh.rank in g)
        groups._EXPERT_DATA_PARALLEL_GROUP[self._group_name] = mesh.group("dp")
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[self._group_name] = mesh.ranks("dp")

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, objective: Tensor) -> None:
        self.engine.backward(objective, scale_wrt_gas=False)

    def finish(self) -> None:
        """Do nothing: DeepSpeed has reduced the gradients already."""

    def apply(self, lr: float) -> float:
        set_learning_rate(self.optimizer, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        return dict(self._weights())

    def moments(self) -> dict[str, Tensor]:
        return dict(self._moments())

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield one tensor at a time: a tensor that was gathered from shards is freed when the next one is asked
        for."""
        yield from (("weights", name, t) for name, t in self._weights())
        yield from (("optim", name, t) for name, t in self._moments())

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage < 3:
            yield from super().weights().items()
            return
        for name, parameter in self.model.named_parameters():
            yield from self._as_global({name: safe_get_full_fp32_param(parameter)}).items()
        yield from ((name, t.detach()) for name, t in self.model.named_buffers())

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        for moment in MOMENTS:
            for name, parameter in self.model.named_parameters():
                [(_, t)] = self._as_global({name: safe_get_full_optimizer_state(parameter, moment)}).items()
                yield f"{moment}.{name}", t

    def begin_at(self, step: int) -> None:
        """Set the number of updates.

        Moments exist since the start, linked to their parameters, and stay the same tensors.
        """
        for state in self.optimizer.state.values():
            state["step"].fill_(float(step))

    def _make_moments(self) -> None:
        """Create the moments before the first step, so that DeepSpeed does not.

        DeepSpeed would link the moments of all groups in the first step, when it has made only those of the first
        group.
        """
        zero = self.engine.optimizer
        slices = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in slices:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def loaded(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.model.named_parameters():
            weight = local(weights[name])
            if self._stage == 3:  # what forward reads and what the optimizer updates are two copies there
                with GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(weight)
            safe_set_full_fp32_param(parameter, weight)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, local(moments[f"{moment}.{name}"]), moment)


def _gathered(model: Decoder) -> dict[str, int]:
    """Return settings by which stage 3 gathers a block and the next one at a time, as with fsdp, and norms for ever.

    By default it gathers up to 1e9 parameters at a time, and keeps smaller models from their forward to the end of
    their backward.
    """
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.blocks.parameters())
    return {
        "stage3_max_live_parameters": outside + 2 * largest,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": largest,
        "stage3_param_persistence_threshold": 10_000,
    }


def _compile_nothing() -> None:
    """Keep DeepSpeed on CPUs from compiling an all-reduce for inference when it starts, which training never calls.

    A process that is killed meanwhile leaves a lock behind, for which every later process would wait for ever.
    """
    from deepspeed import ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def _with_marker(model: Decoder) -> nn.Module:
    """Return the model with an empty layer, by whose class DeepSpeed recognizes that there are experts."""
    from deepspeed.moe.layer import MoE

    class Marker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """Do nothing: the process groups exist already."""

    class WithExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.marker = model, Marker()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    return WithExperts()
