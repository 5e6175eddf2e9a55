"""`mhmoe status`: one run, from its directory and, where it answers, its cluster."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli.common import JsonOption, RunArg, StorageOption, nats, out, print_json, say
from mhmoe_ray.cli.complete import STORAGE

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir


REDRAW_SECONDS = 1.0


def status(
    run: RunArg = None,
    storage: StorageOption = STORAGE,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it until the run is over or Ctrl-C.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show how a run stands.

    For example `mhmoe status tiny-3` for the run whose id begins so, or `mhmoe status --watch` for the newest.
    """
    from mhmoe_ray.cli.status_view import view
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
    """On a terminal the whole view, drawn anew; elsewhere, or as JSON, a line at each new step or state."""
    from rich.live import Live

    from mhmoe_ray.cli.status_view import view
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
