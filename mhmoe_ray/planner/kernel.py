"""The kernel that `auto` is taken for where nothing runs yet; a run's own choice is `mhmoe_kernels.choose`."""

from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.spec.model import FUSED_UP_TO, KERNELS, KernelName


def assumed_kernel(spec: RunSpec) -> KernelName | None:
    """That experts go through, `triton` on GPUs that can have it; None for a dense model. CPUs are taken to have no
    AMX: with it `auto` is `cpp`, which keeps less."""
    moe = spec.model.moe
    if moe is None or moe.kernel != "auto":
        return moe.kernel if moe else None
    narrow = spec.model.d_model // moe.heads <= FUSED_UP_TO
    fused = spec.cluster.gpus_per_worker and spec.train.precision == "bfloat16" and narrow
    return "triton" if fused else "grouped"


def may_be_compiled(spec: RunSpec) -> bool:
    """Whether `auto` is `cpp` where CPUs have AMX."""
    model, moe, limits = spec.model, spec.model.moe, KERNELS["cpp"]
    if moe is None or moe.kernel != "auto" or spec.cluster.gpus_per_worker:
        return False
    fits = not (model.d_model // moe.heads % limits.sizes or moe.d_expert % limits.sizes)
    return fits and model.backbone == limits.backbone and spec.train.precision == limits.precision


def planned_model(spec: RunSpec) -> ModelSpec:
    """The model as training computes it, with that kernel."""
    model, kernel = spec.computed_model, assumed_kernel(spec)
    if model.moe is None:
        return model
    return model.model_copy(update={"moe": model.moe.model_copy(update={"kernel": kernel})})
