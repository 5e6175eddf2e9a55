"""Measurements of models on samples in memory, on a CPU."""

import numpy as np

from mhmoe_ray.evaluate import measure as measure_module

WIDTHS = np.arange(300) % 5


def measure(model, samples, batch, widths=WIDTHS):
    settings = measure_module.MeasureSettings(batch, start_token=0, use_bfloat16=False, on_progress=lambda *_: None)
    return measure_module.measure_samples(model, samples, widths, settings)
