"""Predictions for one H100, made before anything ran on a GPU.

Times of layers are for 32,768 tokens of width 2,048, forward and backward, at 798 TFLOP/s in bfloat16, 3.0 TB/s and 4
microseconds for each kernel, so they are likely to be too short.
"""

from typing import NamedTuple


class Prediction(NamedTuple):
    """Prediction of one measured value."""

    value: float
    unit: str
    is_limit: bool
    """True for a goal that the measured value should not exceed, False for an estimate."""


PREDICTIONS: dict[str, Prediction] = {
    "ceilings: matrix product": Prediction(798, "TFLOP/s", False),
    "ceilings: copy": Prediction(3.0, "TB/s", False),
    "ceilings: launch": Prediction(4, "us", False),
    "layers: SMoE": Prediction(26, "ms", True),
    "layers: MH-MoE h 2 to SMoE": Prediction(1.05, "times", True),
    "layers: MH-MoE h 4 to SMoE": Prediction(1.25, "times", True),
    "layers: SMoE, grouped": Prediction(31.9, "ms", False),
    "layers: MH-MoE h 2, grouped": Prediction(41.2, "ms", False),
    "layers: MH-MoE h 4, grouped": Prediction(57.2, "ms", False),
    "layers: SMoE, grouped_mm": Prediction(35.5, "ms", False),
    "layers: MH-MoE h 2, grouped_mm": Prediction(38.5, "ms", False),
    "layers: MH-MoE h 4, grouped_mm": Prediction(45.1, "ms", False),
    "training: MH-MoE h 2 to SMoE": Prediction(1.06, "times", True),
    "training: MH-MoE h 2 to SMoE at micro-batches of 1": Prediction(2.3, "times", False),
    "training: SMoE static to dropless": Prediction(33.98 / 32.21, "times", False),
    "training: MH-MoE h 2 static to dropless": Prediction(31.93 / 25.77, "times", False),
}
"""Predictions by part of the test and name of the result.

Those of static routing are ratios of the throughputs that the authors of the first MH-MoE paper (arXiv 2404.15045) gave
in its public review.
"""
