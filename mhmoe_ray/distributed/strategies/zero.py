"""DeepSpeed's ZeRO on the process groups of the run's mesh.

Stage 1 shards the optimizer's state over ranks, stage 2 also the gradients, and stage 3 also the weights. With expert
parallelism, experts are a parameter group of their own, sharded over the dp ranks that hold the same ones. DeepSpeed
sums their gradients over these ranks and divides by the world size, as all other strategies do. It gathers tensors for
a checkpoint, and shards them on loading.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.optimizer import build_optimizer, expert_parameters, set_learning_rate
from mhmoe_ray.distributed.rounded_adamw import MOMENT_NAMES
from mhmoe_ray.distributed.strategies.ddp import FillModel, Strategy
from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.feedforward import CastingModule
from mhmoe_ray.model.held import local_shard
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import RunSpec


class ZeroStrategy(Strategy):
    """The strategies zero1, zero2 and zero3: a DeepSpeed engine holds the model and the optimizer."""

    holds_whole_weights = False
    gathers_state = True

    def __init__(self, model: Trunk, mesh: Mesh, spec: RunSpec, fill: FillModel, stage: int) -> None:
        """Fill the model and initialize a DeepSpeed engine; a missing DeepSpeed is a SpecError."""
        try:
            import deepspeed
        except ImportError as error:
            reason = f"DeepSpeed is not installed ({error})"
            raise SpecError(f"cluster.strategy zero{stage}", reason, "pip install 'mhmoe-ray[deepspeed]'") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed expects this variable from a launcher, and here there is none. The value does not matter, because
        # each rank has chosen its device already.
        os.environ.setdefault("LOCAL_RANK", "0")
        self.model, self.mesh, self.spec = model, mesh, spec
        self._stage = stage
        fill(model)
        self._experts = expert_parameters(model) if mesh.ep > 1 else {}
        module: nn.Module = model
        if self._experts:
            self._register_experts()
            module = _add_expert_marker(model)
        self.optimizer = build_optimizer(model, spec.train)
        expert_parameter_ids = {id(p) for p in self._experts.values()}
        for group in self.optimizer.param_groups:
            if any(id(p) in expert_parameter_ids for p in group["params"]):
                group |= {"moe": True, "name": self._group_name}
        train = spec.train
        config = {
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": train.micro_batches // mesh.world_size,
            "gradient_clipping": train.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "reduce_scatter": True,
                # False sends each shard of the gradients only to the rank that keeps it. By default all shards are sent
                # to all ranks, which takes twice the bytes.
                "use_multi_rank_bucket_allreduce": False,
                **_gathering_settings(model),
            },
        }
        if train.precision == "bfloat16":
            # Without these settings, DeepSpeed's forward disables autocast on CUDA. The list is empty, because
            # DeepSpeed would reduce the gradients of modules in its default list in bfloat16.
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            config["torch_autocast"] = autocast
        _disable_compilation()
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self.module = self.engine
        self._create_moments()

    @property
    def _group_name(self) -> str:
        return f"ep_size_{self.mesh.ep}"

    def _register_experts(self) -> None:
        from deepspeed.utils import groups

        # DeepSpeed recognizes a parameter of experts by its two attributes `allreduce` and `group_name`, and finds the
        # experts' process groups under the group name.
        mesh, devices = self.mesh, self.mesh.devices
        assert devices is not None
        for parameter in self._experts.values():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self._group_name  # type: ignore[attr-defined]
        groups._EXPERT_PARALLEL_GROUP[self._group_name] = mesh.group("ep")
        groups._EXPERT_PARALLEL_GROUP_RANKS[self._group_name] = next(g for g in mesh.groups if mesh.rank in g)
        groups._EXPERT_DATA_PARALLEL_GROUP[self._group_name] = mesh.group("expert_dp")
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[self._group_name] = mesh.same_expert_ranks()

    def micro_batch_context(self, is_last: bool) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def whole_layers(self) -> list[CastingModule]:
        """Return no layers: DeepSpeed may replace any parameter's data, so weights are not cast once per step."""
        return []

    def backward(self, objective: Tensor) -> None:
        self.engine.backward(objective, scale_wrt_gas=False)

    def finish_reduction(self) -> None:
        """Do nothing: the backward has reduced the gradients."""

    def apply_update(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        """Update the weights if the norm is finite. DeepSpeed updates them itself, so there is no other condition."""
        assert accepts is math.isfinite
        set_learning_rate(self.optimizer, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _iterate_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight and buffer by name; stage 3 gathers weights one by one."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage < 3:
            yield from super()._iterate_weights()
            return
        for name, parameter in self.model.named_parameters():
            yield from self._to_global({name: safe_get_full_fp32_param(parameter)}).items()
        buffer_names = {name for name, _ in self.model.named_buffers()}
        yield from ((name, t) for name, t in self.model.named_tensors().items() if name in buffer_names)

    def _iterate_moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each of AdamW's moments by name, gathered one by one."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for moment in MOMENT_NAMES:
            for name, parameter in self.model.named_parameters():
                [(_, t)] = self._to_global({name: safe_get_full_optimizer_state(parameter, moment)}).items()
                yield f"{moment}.{name}", t

    def start_at_step(self, step: int) -> None:
        """Set the number of updates, and leave the moments unchanged."""
        # `_create_moments` has created the moments, and they must stay the same tensors, because DeepSpeed has linked
        # them to their parameters.
        for state in self.optimizer.state.values():
            state["step"].fill_(float(step))

    def _create_moments(self) -> None:
        # DeepSpeed must not create the moments itself: it would link those of all parameter groups when it has created
        # only those of the first group.
        zero_optimizer = self.engine.optimizer
        partitions = (
            zero_optimizer.fp32_partitioned_groups_flat
            if self._stage == 3
            else zero_optimizer.single_partition_of_fp32_groups
        )
        for partition in partitions:
            moments = {moment: torch.zeros_like(partition) for moment in MOMENT_NAMES}
            self.optimizer.state[partition] = {"step": torch.zeros((), device=partition.device), **moments}
        if self._stage < 3:
            zero_optimizer._lazy_init_hp_params_optimizer_state()

    def finish_loading(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.model.named_parameters():
            weight = local_shard(weights[name])
            # In stage 3, the weights that the forward reads are not the copies that the optimizer updates, so both are
            # filled.
            if self._stage == 3:
                with GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(weight)
            safe_set_full_fp32_param(parameter, weight)
            for moment in MOMENT_NAMES:
                safe_set_full_optimizer_state(parameter, local_shard(moments[f"{moment}.{name}"]), moment)


def _gathering_settings(model: Trunk) -> dict[str, int]:
    """Return settings with which stage 3 gathers the current and the next block, like fsdp, and keeps small tensors."""
    # By default DeepSpeed gathers up to 1e9 parameters at a time, so a smaller model would stay gathered from its
    # forward to the end of its backward.
    largest_block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    outside_parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.blocks.parameters())
    return {
        "stage3_max_live_parameters": outside_parameters + 2 * largest_block,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": largest_block,
        "stage3_param_persistence_threshold": 10_000,
    }


def _disable_compilation() -> None:
    """Keep DeepSpeed on CPUs from compiling an all-reduce that only inference calls."""
    # If a process is killed while it compiles, it leaves a lock behind, and every later process waits for this lock
    # forever.
    from deepspeed import ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def _add_expert_marker(model: Trunk) -> nn.Module:
    """Return a module that calls the model and has an empty DeepSpeed `MoE`, which marks a model with experts."""
    from deepspeed.moe.layer import MoE

    class ExpertMarker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """Do nothing: the process groups exist already."""

    class WithExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.marker = model, ExpertMarker()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    return WithExperts()
