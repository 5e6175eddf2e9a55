"""`mhmoe status`: show the state of a run, from its directory and, if it answers, its cluster."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mhmoe_ray.cli import options
from mhmoe_ray.cli.formats import BARS, format_bytes, format_count, format_figure, format_nats
from mhmoe_ray.cli.output import fact_table, out, print_json, print_line, print_note, show_activity

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir


def state_view(run_state: dict[str, Any]) -> RenderableType:
    """Return the view of `mhmoe status` of a run, with the last lines of the worker that failed, if one did."""
    parts: list[RenderableType] = [fact_table(_fact_rows(run_state), title=f"{run_state['run']}: {run_state['state']}")]
    if run_state["state"] == "failed" and run_state["last_lines"]:
        parts.append(Text("\nlast lines of the worker that failed", style="bold"))
        parts.append(Text("\n".join(run_state["last_lines"]), style="dim"))
    return Group(*parts)


def _fact_rows(run_state: dict[str, Any]) -> dict[str, str | None]:
    from mhmoe_ray.runs import events
    from mhmoe_ray.runs.start import StartRecord

    rows = {"why": run_state["reason"], "waits for room": run_state["missing"], "imported from": run_state["source"]}
    if run_state["start"]:
        rows["start"] = "\n".join(StartRecord.model_validate(run_state["start"]).lines())
    if run_state["last"]:
        step, steps = run_state["last"]["step"], run_state["steps"]
        rows["step"] = f"{step:,} of {steps:,} ({step / steps:.0%})"
        if run_state["eta_seconds"] is not None:
            rows["left"] = format_duration(run_state["eta_seconds"])
    rows |= _quality_rows(run_state)
    rows |= _speed_rows(run_state)
    rows |= _worker_rows(run_state)
    if run_state["skipped_steps"]:
        rows["skipped steps"] = f"{run_state['skipped_steps']}, whose gradient was not finite or which were spikes"
    if checkpoint := run_state["checkpoint"]:
        text = f"{checkpoint['name']}, {_format_age(checkpoint['time'])}"
        damaged_count = len(run_state["skipped_checkpoints"])
        rows["checkpoint"] = f"{text}; {damaged_count} newer ones were damaged and skipped" if damaged_count else text
    rows["served"] = "\n".join(_format_application(s) for s in run_state["served"])
    # A run that has ended gets no row for its cluster, because it no longer needs the cluster, which may be gone.
    if not events.is_end_state(run_state["state"]):
        rows["cluster"] = run_state["cluster"]
    if address := run_state["dashboard"]:
        # The command has no address, since a run directory of others may name a server that must not get the token.
        rows["dashboard"] = f"{address} (of your cluster: mhmoe cluster dashboard)"
    return rows | {"path": run_state["path"]}


def _quality_rows(run_state: dict[str, Any]) -> dict[str, str | None]:
    from mhmoe_ray.runs.metrics import METRICS

    last_metrics, validation, baselines = run_state["last"], run_state["validation"], run_state["baselines"]
    # The loss of an encoder or a vision model is a sum over parts whose objectives have different units.
    unit = run_state["loss_unit"] or "nats per token"
    has_perplexity = unit == "nats per token"
    rows: dict[str, str | None] = {}
    if last_metrics:
        curve = sparkline([line["loss"] for line in run_state["curve"]])
        rows["loss"] = f"{format_nats(last_metrics['loss'])} {unit}  {curve}".rstrip()
    if validation:
        perplexity = validation["val_perplexity"]
        perplexity_text = f", perplexity {f'{perplexity:,.2f}' if perplexity else 'not finite'}" * has_perplexity
        rows["validation"] = (
            f"loss {format_nats(validation['val_loss'])}{perplexity_text}, at step {validation['step']:,}"
        )
    for row, key in (("  of parts", "part_loss"), ("rewards", "rewards")):
        if last_metrics and (figures := last_metrics.get(key)):
            held_out_figures = (validation or {}).get(f"val_{key}", {})
            rows[row] = ", ".join(
                f"{name} {format_nats(value)}"
                + (f" (validation {format_nats(held_out_figures[name])})" if name in held_out_figures else "")
                for name, value in figures.items()
            )
    # A loss above these values shows that the model has not learned more than frequencies of tokens and of pairs.
    if baselines and "unigram_entropy" in baselines and not has_perplexity:
        rows["  to beat"] = f"{baselines['unigram_entropy']:.4f} unigram entropy of held-out texts"
    elif baselines and baselines.keys() >= {"unigram_entropy", "bigram", "bigram_tokens"}:
        rows["  to beat"] = (
            f"{baselines['unigram_entropy']:.4f} unigram entropy of that text, "
            f"{baselines['bigram']:.4f} bigram model of {baselines['bigram_tokens']:,} training tokens"
        )
    if last_metrics and "balance" in last_metrics:
        rows["balance"] = (
            f"{format_figure(last_metrics['balance'], '.3f')} (1 is uniform); the least used expert has "
            f"{format_figure(last_metrics.get('least_expert'), '.2f')} of its share"
        )
    # Some metrics, such as dropped routes, are worth a row only if they are not zero.
    for metric in METRICS.values():
        if metric.status and last_metrics and last_metrics.get(metric.name):
            rows[metric.name] = metric.status.format(last_metrics[metric.name])
    return rows


def _speed_rows(run_state: dict[str, Any]) -> dict[str, str | None]:
    last_metrics, rate, mean = run_state["last"], run_state["tokens_per_s"], run_state["mean_tokens_per_s"]
    rows: dict[str, str | None] = {}
    if last_metrics and rate:
        clock_text = f", {mean:,.0f} by the clock since workers started" if mean else ""
        rows["speed"] = (
            f"{rate:,.0f} tokens/s{clock_text}; waiting for data {format_figure(last_metrics.get('data_wait'), '.1%')}"
        )
    # A dense model or a single rank sends no rows (sub-tokens) to other ranks, and the ratio would then divide by zero.
    if last_metrics and last_metrics.get("rows_least") and last_metrics.keys() >= {"rows_sent", "counts_sent"}:
        ratio = last_metrics["rows_sent"] / last_metrics["rows_least"]
        internode_rows = last_metrics.get("rows_between_nodes")
        is_hierarchical = run_state["started"] and run_state["started"].get("dispatch") == "hierarchical"
        rows["exchange"] = (
            f"{format_bytes(last_metrics['rows_sent'])} of rows between ranks in a step"
            + (f" ({format_bytes(internode_rows)} between nodes)" if internode_rows else "")
            + f", {ratio:.2f} times {'what flat dispatch would send' if is_hierarchical else 'the least'}"
            + f"; {format_bytes(last_metrics['counts_sent'])} of counts"
        )
    return rows


def _worker_rows(run_state: dict[str, Any]) -> dict[str, str | None]:
    from mhmoe_ray.runs import events

    rows: dict[str, str | None] = {}
    started_event, resource_request = run_state["started"], run_state["asked"]
    if resource_request:
        workers = resource_request["workers"]
        is_range = isinstance(workers, dict)
        count = f"{workers['min']} to {workers['max']} workers" if is_range else format_count(workers, "worker")
        gpus = f", {resource_request['gpus_per_worker']} GPU" if resource_request["gpus_per_worker"] else ""
        rows["asked for"] = (
            f"{count}, ep {resource_request['ep']}; {resource_request['cpus_per_worker']} CPU{gpus} each"
        )
    if started_event:
        host_counts = Counter(worker["host"] for worker in started_event["workers"])
        hosts = ", ".join(f"{count} on {host}" for host, count in sorted(host_counts.items()))
        rows["workers"] = (
            f"{len(started_event['workers'])}: {hosts}; {events.describe_mesh(started_event)}"
            f"; started {_format_times(run_state['worker_starts'])} "
            f"in {format_count(run_state['attempts'], 'attempt')}"
        )
        rows["warning"] = events.describe_straddling_groups(started_event)
    rows["slow"] = "\n".join(events.describe_slow_rank(rank) for rank in run_state["slow_ranks"])
    if interruptions := run_state["interruptions"]:
        rows["interrupted"] = (
            f"{_format_times(len(interruptions))}; last {_format_age(interruptions[-1]['time'])}: "
            f"{interruptions[-1]['what']}"
        )
    return rows


def _format_application(application: dict[str, Any]) -> str:
    message = f": {application['message']}" if application["message"] else ""
    name = f"{application['application']}, {application['checkpoint']}"
    return f"{application['url']} ({name}): {application['status']}{message}"


def _format_age(timestamp: float) -> str:
    # The clock of the machine that wrote the time may be ahead of this machine's clock, so the age is at least 0.
    return f"{format_duration(max(0.0, time.time() - timestamp))} ago"


def _format_times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units that are not zero, for example "3 d 4 h"."""
    remainder = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        value, remainder = divmod(remainder, size)
        if value or (unit == "s" and not parts):
            parts.append(f"{value} {unit}")
    return " ".join(parts[:2])


def sparkline(values: list[float | None], width: int = 24) -> str:
    """Plot at least 3 finite values in one line of block characters, if the terminal has UTF-8."""
    finite_values = [v for v in values if v is not None and math.isfinite(v)]
    # Two values are no curve, and a single value would divide by zero below.
    if len(finite_values) < 3 or "utf" not in (out.encoding or "").lower():
        return ""
    width = min(width, len(finite_values))
    points = [finite_values[round(i * (len(finite_values) - 1) / (width - 1))] for i in range(width)]
    low, high = min(points), max(points)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for v in points)


REDRAW_SECONDS = 1.0


def status(
    run: options.RunArg = None,
    storage: options.StorageOption = options.STORAGE,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Update the view until the run is over, or Ctrl-C.")
    ] = False,
    json: options.JsonOption = False,
) -> None:
    """Show the state of a run.

    For example `mhmoe status tiny-3` for the run whose id begins with tiny-3, or `mhmoe status --watch` for the newest.
    """
    show_activity("asking the cluster about the run")
    from mhmoe_ray.cluster.runs import run_status
    from mhmoe_ray.runs.directory import find_run

    run_dir = find_run(run, storage, with_job=watch)
    if watch:
        _watch(run_dir, json)
    elif json:
        print_json(run_status(run_dir))
    else:
        out.print(state_view(run_status(run_dir)))


def _watch(run: "RunDir", json: bool) -> None:
    """Show the state of a run until it is over; a terminal redraws it, elsewhere a new step or state is a line."""
    from rich.live import Live

    from mhmoe_ray.cluster.dashboard import RetryingCaller
    from mhmoe_ray.cluster.runs import run_status
    from mhmoe_ray.runs import events

    # A script may wait by this command, and then shut the cluster down, so it retries without end.
    retrying_caller = RetryingCaller(print_note, is_endless=not out.is_terminal)

    def states() -> Iterator[dict[str, Any]]:
        while True:
            if run_state := retrying_caller.call(lambda: run_status(run), None):
                yield run_state
                if events.is_end_state(run_state["state"]):
                    return
            time.sleep(REDRAW_SECONDS)

    with suppress(KeyboardInterrupt):
        if out.is_terminal and not json:
            # The view changes only with a new state, so automatic refreshes would redraw the same lines.
            with Live(console=out, auto_refresh=False, vertical_overflow="visible") as live:
                for run_state in states():
                    live.update(state_view(run_state), refresh=True)
            return
        previous_progress: tuple[Any, ...] | None = None
        for run_state in states():
            progress = (run_state["state"], run_state["last"] and run_state["last"]["step"])
            if progress != previous_progress:
                _print_line(run_state, json)
            previous_progress = progress


def _print_line(run_state: dict[str, Any], json: bool) -> None:
    if json:
        print_json(run_state, indent=None)
        return
    last_metrics = run_state["last"]
    progress = ""
    if last_metrics:
        progress = f"  step {last_metrics['step']}/{run_state['steps']}  loss {format_nats(last_metrics['loss'])}"
    print_line(f"{run_state['run']}: {run_state['state']}{progress}")
