"""Spikes of the loss or the gradient norm, whose updates are skipped if the spec has `train.spikes`."""

import statistics
from collections.abc import Sequence

from mhmoe_ray.spec.train import SpikeSpec


def spike_reason(spec: SpikeSpec, recent_updates: Sequence[Sequence[float]], loss: float, norm: float) -> str | None:
    """Return what makes a step a spike, given loss and gradient norm of the last updates; None for another step."""
    if len(recent_updates) < spec.window:
        return None
    for name, value, recent_values in zip(
        ("loss", "gradient norm"), (loss, norm), zip(*recent_updates, strict=True), strict=True
    ):
        limit = statistics.fmean(recent_values) + spec.deviations * statistics.stdev(recent_values)
        if value > limit:
            return f"its {name} of {value:.4g} is above {limit:.4g}"
    return None
