"""All that `mhmoe status` tells of a run: from its directory, and from its cluster where that answers."""

from collections.abc import Callable
from typing import Any

from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.cluster.run_outcome import QUIET_SECONDS, outcome, recorded_outcome
from mhmoe_ray.cluster.serving import applications
from mhmoe_ray.errors import ClusterError, MhmoeError
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import RunDir, read_attempts
from mhmoe_ray.runs.metrics import course
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import location

Happened = list[dict[str, Any]]


def standing(run: RunDir) -> dict[str, Any]:
    """JSON. `cluster` says whether the cluster confirmed the state."""
    happened = events.events(run)
    spec = None if run.is_imported else run.spec()
    went = course(run, spec.train.validate_every if spec else 1)
    attempts = read_attempts(run)
    state, reason, cluster = state_of(run, happened)
    last = went.last
    started = events.newest(happened, "started")
    lost = events.newest(happened, "lost")
    eta = None
    if spec and last and state == "running" and went.mean_rate:
        eta = (spec.train.steps - last[metrics.STEP]) * last[metrics.TOKENS] / last[metrics.STEP] / went.mean_rate
    return {
        "run": run.id,
        "path": str(run.path),
        "state": state,
        "reason": reason,
        "cluster": cluster,
        "dashboard": attempts[-1].address if attempts else None,
        "job": attempts[-1].job if attempts else None,
        "source": next((e["source"] for e in happened if e["event"] == "imported"), None),
        "attempts": len(attempts),
        "worker_starts": sum(e["event"] == "started" for e in happened),
        "steps": spec.train.steps if spec else None,
        "last": last,
        "validation": _with_perplexity(went.validation),
        "baselines": events.newest(happened, "prepared"),
        "asked": _asked(spec) if spec else None,
        "started": started,
        "interruptions": [{"time": when, "what": what} for when, what in events.interruptions(happened)],
        "last_lines": lost["lines"] if lost else [],
        "skipped_steps": last.get(metrics.SKIPPED_STEPS, 0) if last else 0,
        "skipped_checkpoints": [e["name"] for e in happened if e["event"] == "skipped_checkpoint"],
        "checkpoint": events.newest(happened, "checkpoint") or events.newest(happened, "imported"),
        "tokens_per_s": went.rate,
        "mean_tokens_per_s": went.mean_rate,
        "eta_seconds": eta,
        "served": served(run, happened),
        "curve": [
            {key: line.get(key) for key in (metrics.STEP, metrics.LOSS, metrics.TOKENS_PER_S)} for line in went.curve
        ],
    }


def state_of(run: RunDir, happened: Happened, connected: Callable[[str], Connection] = connect) -> tuple[str, str, str]:
    """The state, the reason of a failure, and what the cluster said: "unknown" where it should but does not answer."""
    attempts = read_attempts(run)
    over, cluster = recorded_outcome(happened), "not asked: the run is over"
    said = events.state(happened)
    if over is None and attempts:
        try:
            over = outcome(run, connected(attempts[-1].address), doubt=QUIET_SECONDS)
            cluster = "the job is alive" if over is None else "the job is dead"
        except ClusterError as e:
            return "unknown", "", f"it said {said} last, but {e}"
    return (over.state, over.reason, cluster) if over else (said, "", cluster)


def _with_perplexity(line: dict[str, Any] | None) -> dict[str, Any] | None:
    if line is None:
        return None
    return {**line, "val_perplexity": metrics.perplexity(line[metrics.VAL_LOSS])}


def _asked(spec: RunSpec) -> dict[str, Any]:
    cluster = spec.cluster
    return {
        "workers": cluster.workers.model_dump(),
        "ep": cluster.ep,
        "cpus_per_worker": cluster.cpus_per_worker,
        "gpus_per_worker": cluster.gpus_per_worker,
    }


def served(run: RunDir, happened: Happened, seconds: float = 10) -> list[dict[str, Any]]:
    """Where its checkpoints are served, as the clusters say that they were once deployed to; "unknown" where one does
    not say so in as many seconds."""
    deployed = {(e["address"], e["application"]): e for e in happened if e["event"] == "served"}
    found = []
    for address in {address for address, _ in deployed}:
        try:
            there = {a.name: a for a in applications(connect(address), seconds)}
        except MhmoeError as e:
            names = [name for where, name in deployed if where == address]
            found += [
                {"application": n, "url": deployed[address, n]["url"], "status": "unknown", "message": e.why}
                | {"checkpoint": deployed[address, n]["checkpoint"]}
                for n in names
            ]
            continue
        for application in there.values():
            checkpoint = location(application.checkpoint) if application.checkpoint else None
            if checkpoint and RunDir.of_checkpoint(checkpoint) == run:
                where = {"application": application.name, "url": application.url, "checkpoint": checkpoint.name}
                found.append({**where, "status": application.status, "message": application.message})
    return found
