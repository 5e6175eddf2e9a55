"""Where a run's metrics go beside metrics.jsonl: `line.py` makes a step's line, and each of the others takes it.

line.py          all numbers of a step, under the names of runs/metrics.py
ray_metrics.py   Ray's metrics, which a node gives to Prometheus; the names of all are in it
tensorboard.py   event files in the run directory
"""

from mhmoe_ray.train.telemetry.line import Totals, Waits, step_line
from mhmoe_ray.train.telemetry.sinks import Telemetry

__all__ = ["Telemetry", "Totals", "Waits", "step_line"]
