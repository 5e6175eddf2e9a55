"""How much of its accelerators' arithmetic a run uses."""

from mhmoe_ray.planner.sizes import flops_per_token
from mhmoe_ray.spec import RunSpec


def model_flops_utilisation(spec: RunSpec, tokens_per_s: float, workers: int) -> float | None:
    """FLOPs that the model needs, over those that its accelerators could do (MFU; PaLM, arXiv 2204.02311, appendix B).

    What is computed twice to spare memory does not count, and of attention only the half that a causal mask leaves.

    Args:
        spec: its `cluster.accelerator` tells the peak.
        tokens_per_s: of all workers.
        workers: with a GPU each.

    Returns:
        A share of 1; None on CPUs, of which no peak is told.
    """
    if not spec.cluster.gpus_per_worker:
        return None
    peak = spec.cluster.accelerator.peak(spec.train.precision)
    needed = flops_per_token(spec.model, spec.data.seq_len).training * tokens_per_s
    return needed / (workers * spec.cluster.gpus_per_worker * peak)
