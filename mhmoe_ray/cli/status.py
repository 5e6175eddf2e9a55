"""`mhmoe status`: one run, from its directory and, where it answers, its cluster."""

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import STORAGE, JsonOption, RunArg, StorageOption, facts, in_bytes, nats, out, print_json

if TYPE_CHECKING:
    from mhmoe_ray.runs.layout import RunDir


def status(run: RunArg = None, storage: StorageOption = STORAGE, json: JsonOption = False) -> None:
    """Show how a run stands."""
    from mhmoe_ray.runs.layout import find_run

    found = as_dict(find_run(run, storage))
    if json:
        print_json(found)
    else:
        out.print(facts(_rows(found), title=f"{found['run']}: {found['state']}"))


def as_dict(run: "RunDir") -> dict[str, Any]:
    """All that `status` shows. `cluster` says whether the cluster confirmed it."""
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.watch import outcome, recorded_outcome
    from mhmoe_ray.errors import ClusterError
    from mhmoe_ray.runs import events, metrics
    from mhmoe_ray.runs.state import read_attempts

    happened, history = events.events(run), metrics.history(run)
    state: str = events.state(happened)
    reason, cluster = "", "not asked: the run is over"
    attempts = read_attempts(run)
    over = recorded_outcome(run)
    if over is None and attempts:
        try:
            over = outcome(run, connect(attempts[-1].address))
            cluster = "the job is alive" if over is None else "the job is dead"
        except ClusterError as e:
            state, cluster = "unknown", f"it said {state} last, but {e}"
    if over:
        state, reason = over
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
        "steps": None if run.is_imported else run.spec().train.steps,
        "last": history[-1] if history else None,
        "validation": next((line for line in reversed(history) if metrics.VAL_LOSS in line), None),
        "baselines": next((e for e in reversed(happened) if e["event"] == "prepared"), None),
        "started": next((e for e in reversed(happened) if e["event"] == "started"), None),
        "hung": [e for e in happened if e["event"] == "hung"],
        "skipped_steps": sum(metrics.SKIPPED in line for line in history),
        "preempted": [e for e in happened if e["event"] == "preempted"],
        "skipped_checkpoints": [e["name"] for e in happened if e["event"] == "skipped_checkpoint"],
        "checkpoint": next((e for e in reversed(happened) if e["event"] in ("checkpoint", "imported")), None),
        "tokens_per_s": _mean_rate(history),
    }


def _mean_rate(history: list[dict[str, Any]]) -> float | None:
    """Tokens per second over the steps so far; the first step of a worker group, which warms up, is left out."""
    from mhmoe_ray.runs import metrics

    warm = [
        (b[metrics.TOKENS] - a[metrics.TOKENS], b[metrics.TOKENS_PER_S])
        for a, b in pairwise(history)
        if a[metrics.GROUP] == b[metrics.GROUP]
    ]
    seconds = sum(tokens / rate for tokens, rate in warm if tokens)
    return float(sum(tokens for tokens, _ in warm) / seconds) if seconds else None


def _rows(found: dict[str, Any]) -> dict[str, str | None]:
    from mhmoe_ray.runs import events

    last, validation, base = found["last"], found["validation"], found["baselines"]
    started, checkpoint, rate = found["started"], found["checkpoint"], found["tokens_per_s"]
    rows: dict[str, str | None] = {"why": found["reason"]}
    if found["source"]:
        rows["imported from"] = found["source"]
    if last:
        rows["step"] = f"{last['step']} of {found['steps']}"
        rows["loss"] = f"{nats(last['loss'])} nats per token"
    if validation:
        rows["validation loss"] = f"{nats(validation['val_loss'])} at step {validation['step']}"
    if base:
        rows["  to beat"] = (
            f"{base['unigram_entropy']:.4f} unigram entropy of that text, "
            f"{base['bigram']:.4f} bigram model of {base['bigram_tokens']:,} training tokens"
        )
    if last and "balance" in last:
        least = f"the least used expert has {last['least_expert']:.2f} of its share"
        rows["balance"] = f"{last['balance']:.3f} (1 is uniform); {least}"
    if last and last.get("rows_least"):
        ratio, far = last["rows_sent"] / last["rows_least"], last.get("rows_between_nodes")
        hierarchical = started and started.get("dispatch") == "hierarchical"
        rows["exchange"] = (
            f"{in_bytes(last['rows_sent'])} of rows between ranks in a step"
            + (f" ({in_bytes(far)} between nodes)" if far else "")
            + f", {ratio:.2f} times {'what flat dispatch would send' if hierarchical else 'the least'}"
            + f"; {in_bytes(last['counts_sent'])} of counts"
        )
    if rate and last:
        rows["speed"] = f"{rate:,.0f} tokens/s, waiting for data {last['data_wait']:.1%}"
        if found["state"] == "running":
            left = (found["steps"] - last["step"]) * last["tokens"] / last["step"] / rate
            rows["left"] = f"about {left:,.0f} s"
    if started:
        hosts = sorted({w["host"] for w in started["workers"]})
        rows["workers"] = (
            f"{events.workers(started)} on {', '.join(hosts)}: dp {started['dp']} x ep {started['ep']}"
            f"; started {found['worker_starts']} times in {found['attempts']} attempts"
        )
        rows["warning"] = events.straddling(started)
    if found["hung"]:
        again = f" ({len(found['hung'])} such)" if len(found["hung"]) > 1 else ""
        rows["hung"] = events.hung(found["hung"][-1]) + again
    if found["skipped_steps"]:
        rows["skipped steps"] = f"{found['skipped_steps']}, whose gradient was not finite"
    if found["preempted"]:
        rows["preempted"] = f"{len(found['preempted'])} times; last: {events.preempted(found['preempted'][-1])}"
    if checkpoint:
        said = f"{checkpoint['name']}, {time.time() - checkpoint['time']:,.0f} s ago"
        damaged = len(set(found["skipped_checkpoints"]))
        rows["checkpoint"] = f"{said}; {damaged} newer ones were damaged and passed over" if damaged else said
    if not events.is_over(found["state"]):
        rows["cluster"] = found["cluster"]
    rows["dashboard"] = found["dashboard"]
    rows["path"] = found["path"]
    return rows
