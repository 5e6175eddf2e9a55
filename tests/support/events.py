"""Events and lines of metrics with the fields that all of their kind have."""

from mhmoe_ray.runs import events, history, metrics

LINE = {metrics.TIME: 1000.0, metrics.LOSS: 2.5, metrics.TOKENS: 70, metrics.TOKENS_PER_S: 9.0, metrics.GROUP: 1}
WORKER = {"rank": 0, "pid": 1, "host": "x", "node": "a1"}
FIELDS = {
    "started": {"group": 1, "step": 0, "workers": []},
    "restoring": {"name": None},
    "lost": {"rank": 0, "ranks": 1, "host": "x", "reason": "killed", "lines": []},
    "checkpoint": {"name": "step_00000007.1"},
}


def record(run, kind, **fields):
    """Record an event, with values of this module for the required fields that are not given."""
    events.record(run, kind, **FIELDS.get(kind, {}) | fields)


def append_line(run, step, **values):
    """Append a line to a run's metrics.jsonl, with values of this module for the required metrics."""
    history.append(run, {metrics.STEP: step, **LINE, **values})
