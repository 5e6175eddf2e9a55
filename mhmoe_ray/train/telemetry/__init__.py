"""Metrics of a run: `line.py` makes a step's line, and each of the other modules sends it to one place.

    line.py          all numbers of a step, under the names of runs/metrics.py
    sinks.py         metrics.jsonl, and all places below, for one rank
    ray_metrics.py   Ray's metrics, which each node exports to Prometheus, under the names of runs/metrics.py
    tensorboard.py   event files in the run directory
    mlflow.py        an MLflow server, where the spec names one

Rank 0 reports what concerns the whole run.
"""

from mhmoe_ray.train.telemetry.line import Totals, Waits, step_line
from mhmoe_ray.train.telemetry.mlflow import End
from mhmoe_ray.train.telemetry.sinks import Telemetry

__all__ = ["End", "Telemetry", "Totals", "Waits", "step_line"]
