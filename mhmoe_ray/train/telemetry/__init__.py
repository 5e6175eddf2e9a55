"""Where a run's metrics go: `line.py` makes a step's line, and each of the others takes it.

    line.py          all numbers of a step, under the names of runs/metrics.py
    sinks.py         metrics.jsonl, and all of the others, for a rank
    ray_metrics.py   Ray's metrics, which a node gives to Prometheus, under the names of runs/metrics.py
    tensorboard.py   event files in the run directory
    mlflow.py        a server of MLflow's, where the spec names one

What concerns the whole run, rank 0 tells.
"""

from mhmoe_ray.train.telemetry.line import Totals, Waits, step_line
from mhmoe_ray.train.telemetry.mlflow import End
from mhmoe_ray.train.telemetry.sinks import Telemetry

__all__ = ["End", "Telemetry", "Totals", "Waits", "step_line"]
