"""`mhmoe status`: show one run, from its directory and, if it answers, its cluster."""

import math
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mhmoe_ray.cli.common import (
    BARS,
    STORAGE,
    JsonOption,
    RunArg,
    StorageOption,
    facts,
    figure,
    in_bytes,
    nats,
    out,
    print_json,
    say,
)

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir


def view(found: dict[str, Any]) -> RenderableType:
    """Return the view of a run's state.

    Args:
        found: the state, as `cluster.runs.standing` returns it.
    """
    parts: list[RenderableType] = [facts(_rows(found), title=f"{found['run']}: {found['state']}")]
    if found["state"] == "failed" and found["last_lines"]:
        parts.append(Text("\nlast lines of the worker that failed", style="bold"))
        parts.append(Text("\n".join(found["last_lines"]), style="dim"))
    return Group(*parts)


def _rows(found: dict[str, Any]) -> dict[str, str | None]:
    from mhmoe_ray.runs import events

    rows = {"why": found["reason"], "waits for room": found["missing"], "imported from": found["source"]}
    rows |= _progress(found)
    rows |= _quality(found)
    rows |= _speed(found)
    rows |= _workers(found)
    if found["skipped_steps"]:
        rows["skipped steps"] = f"{found['skipped_steps']}, whose gradient was not finite"
    if checkpoint := found["checkpoint"]:
        said = f"{checkpoint['name']}, {_ago(checkpoint['time'])}"
        damaged = len(set(found["skipped_checkpoints"]))
        rows["checkpoint"] = f"{said}; {damaged} newer ones were damaged and passed over" if damaged else said
    rows["served"] = "\n".join(_served(s) for s in found["served"])
    if not events.is_over(found["state"]):
        rows["cluster"] = found["cluster"]
    return rows | {"dashboard": found["dashboard"], "path": found["path"]}


def _progress(found: dict[str, Any]) -> dict[str, str | None]:
    last, steps = found["last"], found["steps"]
    if not last:
        return {}
    rows: dict[str, str | None] = {"step": f"{last['step']:,} of {steps:,} ({last['step'] / steps:.0%})"}
    if found["eta_seconds"] is not None:
        rows["left"] = duration(found["eta_seconds"])
    return rows


def _quality(found: dict[str, Any]) -> dict[str, str | None]:
    from mhmoe_ray.runs.metrics import METRICS

    last, validation, base = found["last"], found["validation"], found["baselines"]
    rows: dict[str, str | None] = {}
    if last:
        curve = sparkline([line["loss"] for line in found["curve"]])
        rows["loss"] = f"{nats(last['loss'])} nats per token  {curve}".rstrip()
    if validation:
        perplexity = validation["val_perplexity"]
        shown = f"{perplexity:,.2f}" if perplexity else "not finite"
        rows["validation"] = f"loss {nats(validation['val_loss'])}, perplexity {shown}, at step {validation['step']:,}"
    if base:
        rows["  to beat"] = (
            f"{base['unigram_entropy']:.4f} unigram entropy of that text, "
            f"{base['bigram']:.4f} bigram model of {base['bigram_tokens']:,} training tokens"
        )
    if last and "balance" in last:
        rows["balance"] = (
            f"{figure(last['balance'], '.3f')} (1 is uniform); the least used expert has "
            f"{figure(last['least_expert'], '.2f')} of its share"
        )
    for metric in METRICS.values():
        if metric.status and last and last.get(metric.name):
            rows[metric.name] = metric.status.format(last[metric.name])
    return rows


def _speed(found: dict[str, Any]) -> dict[str, str | None]:
    last, rate, mean = found["last"], found["tokens_per_s"], found["mean_tokens_per_s"]
    rows: dict[str, str | None] = {}
    if last and rate:
        by_clock = f", {mean:,.0f} by the clock since workers started" if mean else ""
        rows["speed"] = f"{rate:,.0f} tokens/s{by_clock}; waiting for data {last['data_wait']:.1%}"
    if last and last.get("rows_least"):
        ratio, far = last["rows_sent"] / last["rows_least"], last.get("rows_between_nodes")
        hierarchical = found["started"] and found["started"].get("dispatch") == "hierarchical"
        rows["exchange"] = (
            f"{in_bytes(last['rows_sent'])} of rows between ranks in a step"
            + (f" ({in_bytes(far)} between nodes)" if far else "")
            + f", {ratio:.2f} times {'what flat dispatch would send' if hierarchical else 'the least'}"
            + f"; {in_bytes(last['counts_sent'])} of counts"
        )
    return rows


def _workers(found: dict[str, Any]) -> dict[str, str | None]:
    from mhmoe_ray.runs import events

    rows: dict[str, str | None] = {}
    started, asked = found["started"], found["asked"]
    if asked:
        workers = asked["workers"]
        count = f"{workers['min']} to {workers['max']}" if isinstance(workers, dict) else str(workers)
        gpus = f", {asked['gpus_per_worker']} GPU" if asked["gpus_per_worker"] else ""
        rows["asked for"] = f"{count} workers, ep {asked['ep']}; {asked['cpus_per_worker']} CPU{gpus} each"
    if started:
        on = Counter(worker["host"] for worker in started["workers"])
        where = ", ".join(f"{count} on {host}" for host, count in sorted(on.items()))
        rows["workers"] = (
            f"{len(started['workers'])}: {where}; {events.mesh(started)}"
            f"; started {_times(found['worker_starts'])} in {_plural(found['attempts'], 'attempt')}"
        )
        rows["warning"] = events.straddling(started)
    if cut := found["interruptions"]:
        rows["interrupted"] = f"{_times(len(cut))}; last {_ago(cut[-1]['time'])}: {cut[-1]['what']}"
    return rows


def _served(served: dict[str, Any]) -> str:
    message = f": {served['message']}" if served["message"] else ""
    return f"{served['url']} ({served['application']}, {served['checkpoint']}): {served['status']}{message}"


def _ago(when: float) -> str:
    return f"{duration(max(0.0, time.time() - when))} ago"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: 3 d 4 h."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        value, left = divmod(left, size)
        if value or (unit == "s" and not parts):
            parts.append(f"{value} {unit}")
    return " ".join(parts[:2])


def sparkline(values: list[float | None], width: int = 24) -> str:
    """Return a line of block characters that plots the values; empty for fewer than 3, or if the terminal has no
    UTF-8."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < 3 or "utf" not in (out.encoding or "").lower():
        return ""
    width = min(width, len(known))
    chosen = [known[round(i * (len(known) - 1) / (width - 1))] for i in range(width)]
    low, high = min(chosen), max(chosen)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for v in chosen)


REDRAW_SECONDS = 1.0


def status(
    run: RunArg = None,
    storage: StorageOption = STORAGE,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until the run is over or Ctrl-C.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show the state of a run.

    For example `mhmoe status tiny-3` for the run whose id begins so, or `mhmoe status --watch` for the newest.
    """
    from mhmoe_ray.cluster.runs import standing
    from mhmoe_ray.runs.directory import find_run

    found = find_run(run, storage, with_job=watch)
    if watch:
        _watch(found, json)
    elif json:
        print_json(standing(found))
    else:
        out.print(view(standing(found)))


def _watch(run: "RunDir", json: bool) -> None:
    """Show the state until the run is over: the whole view, redrawn, on a terminal; elsewhere, or as JSON, a line at
    each new step or state."""
    from rich.live import Live

    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.cluster.runs import standing

    # Where nobody looks on, a script waits for the run, and may take its cluster along when this ends.
    patience = Patience(say, for_ever=not out.is_terminal)

    def asked() -> dict[str, Any]:
        while (now := patience.ask(lambda: standing(run), None)) is None:
            time.sleep(REDRAW_SECONDS)
        return now

    try:
        if out.is_terminal and not json:
            with Live(console=out, auto_refresh=False, vertical_overflow="visible") as live:
                while True:
                    now = asked()
                    live.update(view(now), refresh=True)
                    if _is_over(now):
                        return
                    time.sleep(REDRAW_SECONDS)
        before: tuple[Any, ...] | None = None
        while True:
            now = asked()
            at = (now["state"], now["last"] and now["last"]["step"])
            if at != before:
                _print_line(now, json)
            if _is_over(now):
                return
            before = at
            time.sleep(REDRAW_SECONDS)
    except KeyboardInterrupt:
        return


def _is_over(found: dict[str, Any]) -> bool:
    from mhmoe_ray.runs import events

    return events.is_over(found["state"])


def _print_line(found: dict[str, Any], json: bool) -> None:
    if json:
        print_json(found, indent=None)
        return
    last = found["last"]
    at = f"  step {last['step']}/{found['steps']}  loss {nats(last['loss'])}" if last else ""
    out.print(f"{found['run']}: {found['state']}{at}", soft_wrap=True)
