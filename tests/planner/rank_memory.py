"""Functions that ranks run to measure what they hold in a training step, in bytes."""

import gc
import os

from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from tests.train.jobs import build_trainer, micro_batches, rank_batches


def state_bytes_of_rank(spec):
    """Return the bytes of a rank's weights, of its gradients after a step's last backward, and of its moments."""
    trainer = build_trainer(spec)
    sums = trainer.accumulate(micro_batches(spec, 0)[trainer.mesh.rank :: trainer.mesh.world_size])
    parameters = list(trainer.model.parameters())
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    weights = sum(local(p).nbytes for p in parameters)
    gradient_bytes = sum(g.nbytes for g in gradients)
    trainer.update(sums)
    states = trainer.strategy.optimizer.state.values()
    return weights, gradient_bytes, sum(local(s[key]).nbytes for s in states for key in ("exp_avg", "exp_avg_sq"))


def local(tensor):
    """Return this rank's part of a tensor that may be distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded_bytes_of_rank(spec):
    """Return the bytes of FSDP's unsharded weights while the last layer's experts compute, and of its unsharded
    gradients after each micro-batch."""
    trainer = build_trainer(spec)

    def fsdp_parameters():
        # Several modules may share a group.
        modules = [m for m in trainer.model.modules() if isinstance(m, FSDPModule)]
        groups = {id(group): group for m in modules if (group := m._get_fsdp_state()._fsdp_param_group)}
        return [p for group in groups.values() for p in group.fsdp_params]

    weights, gradients = [], []

    def record_weights(*_):
        weights.append(
            sum(p._unsharded_param.nbytes for p in fsdp_parameters() if p.sharded_state == ShardedState.UNSHARDED)
        )

    trainer.model.moe_layers()[-1].experts.register_forward_pre_hook(record_weights)
    backward = trainer.strategy.backward

    def backward_and_record(objective):
        backward(objective)
        gradient_tensors = [p.unsharded_accumulated_grad for p in fsdp_parameters()]
        gradient_tensors += [p._unsharded_param.grad for p in fsdp_parameters() if hasattr(p, "_unsharded_param")]
        gradients.append(sum(g.nbytes for g in gradient_tensors if g is not None))

    trainer.strategy.backward = backward_and_record
    trainer.accumulate(micro_batches(spec, 0)[trainer.mesh.rank :: trainer.mesh.world_size])
    return weights[0], gradients


def loss_bytes_of_rank(spec):
    """Return the most bytes of a micro-batch while its loss is computed, and those when its backward begins, both in
    addition to the rank's state."""
    trainer = build_trainer(spec)
    batches = rank_batches(spec, 0, trainer)[:1]
    for _ in range(2):
        trainer.accumulate(batches)  # allocates gradients, and DDP's buckets anew in the second forward
    backward = trainer.strategy.backward

    def mark(name):
        with record_function(name):
            pass

    def backward_after_mark(objective):
        mark("backward begins")
        backward(objective)

    trainer.strategy.backward = backward_after_mark
    trainer.model.final_norms()[0].register_forward_hook(lambda *_: mark("loss begins"))
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # The profiler misses what a thread of gloo frees, which happens at random. So the least bytes are right.
    return tuple(map(min, zip(*(_loss_bytes(lambda: trainer.accumulate(batches)) for _ in range(3)), strict=True)))


def _loss_bytes(run):
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live_bytes = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live_bytes += event.nbytes()
            peak = max(peak, live_bytes)
        elif event.name() == "loss begins":
            peak = live_bytes
        elif event.name() == "backward begins":
            return peak, live_bytes
    raise AssertionError("no backward began")
