"""Telemetry of a run: `line.py` builds a line with a step's metrics, and the other modules send it to one sink each.

    line.py          all metrics of a step, under the names of runs/metrics.py
    sinks.py         metrics.jsonl, and all sinks below, for one rank
    servers.py       the tracking servers of a run
    tracker.py       the interface of trackers, and the queue of those that send requests
    ray_metrics.py   Ray's metrics, which each node exports to Prometheus, under the names of runs/metrics.py
    tensorboard.py   event files in the run directory
    mlflow.py        an MLflow server, if the spec names one
    wandb.py         Weights & Biases, if the spec asks for it

Rank 0 reports the metrics of the whole run. Each rank reports its own waits (`data_wait`, `exchange_wait`), and
its own time (`slowdown`), with which stragglers are found (train/stragglers.py).
"""
