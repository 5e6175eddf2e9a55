"""Values for one H100 that no code computes: the ceilings of the predictions, goals, and published ratios."""

from typing import Any, NamedTuple

PEAK_FLOPS, FLOAT32_FLOPS, BANDWIDTH, LAUNCH_SECONDS = 798e12, 50e12, 3.0e12, 4e-6
"""Rates of an H100: FLOP/s of matrix products in bfloat16 and in float32, which has no matrix units, bytes/s of its
memory, and seconds for each kernel.

The first and third are from published measurements (kernels/README.md), the second is three quarters of the data
sheet's rate, and the last one is the planner's default."""


class Prediction(NamedTuple):
    """Prediction of a measured value: a goal that it should not exceed if `is_limit`, else an estimate."""

    value: float
    unit: str
    is_limit: bool

    def is_estimate_of(self, row: dict[str, Any]) -> bool:
        """Return whether this estimates a figure that a row of results has."""
        return not self.is_limit and self.value > 0 and isinstance(row.get(self.unit), int | float)


STATED_PREDICTIONS: dict[str, Prediction] = {
    "ceilings: matrix product": Prediction(PEAK_FLOPS / 1e12, "TFLOP/s", False),
    "ceilings: copy": Prediction(BANDWIDTH / 1e12, "TB/s", False),
    "ceilings: launch": Prediction(LAUNCH_SECONDS * 1e6, "us", False),
    "layers: SMoE": Prediction(26, "ms", True),
    "layers: MH-MoE h 2 to SMoE": Prediction(1.05, "times", True),
    "layers: MH-MoE h 4 to SMoE": Prediction(1.25, "times", True),
    "training: MH-MoE h 2 to SMoE": Prediction(1.06, "times", True),
    "training: SMoE static to dropless": Prediction(33.98 / 32.21, "times", False),
    "training: MH-MoE h 2 static to dropless": Prediction(31.93 / 25.77, "times", False),
}
"""Predictions by part and result; the part `predictions` computes more.

Those of static routing are ratios of throughputs in the public review of arXiv 2404.15045."""
