"""Following a run to its end from its directory, with an eye on its job."""

import time
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from mhmoe_ray.cli.common import note, out

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.layout import RunDir

POLL_SECONDS = 0.5


def follow(run: "RunDir", connection: "Connection") -> None:
    """Show progress until the run is over. On a terminal a bar, elsewhere a line at each validation.

    Raises:
        JobError: the run failed; the reason is in it.
    """
    from mhmoe_ray.cluster.watch import outcome
    from mhmoe_ray.errors import JobError
    from mhmoe_ray.runs import events

    try:
        with _bar() as progress:
            view = _View(run, progress)
            while (over := outcome(run, connection)) is None:
                view.refresh()
                time.sleep(POLL_SECONDS)
            view.refresh()
    except KeyboardInterrupt:
        note.print(f"\ndetached; the run goes on. See: mhmoe status {run.id}; to end it: mhmoe stop {run.id}")
        return
    if over.state == "failed":
        raise JobError(f"run {run.id}", over.reason, f"see `mhmoe logs {run.id}`, then `mhmoe resume {run.id}`")
    last = events.events(run)[-1]
    out.print(f"run {run.id} {over.state} at step {last.get('step')}")


def _bar() -> Progress:
    text = TextColumn("{task.fields[figures]}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(compact=True), text, console=note, disable=not note.is_terminal)


class _View:
    def __init__(self, run: "RunDir", progress: Progress) -> None:
        from mhmoe_ray.runs.jsonl import Tail

        self._run, self._progress = run, progress
        self._task = progress.add_task("submitted", total=run.spec().train.steps, figures="")
        self._metrics, self._events = Tail(run.metrics_file), Tail(run.events_file)

    def refresh(self) -> None:
        from mhmoe_ray.runs import metrics

        for event in self._events.new():
            self._say(event)
        for line in self._metrics.new():
            figures = f"loss {line[metrics.LOSS]:.3f}  {line[metrics.TOKENS_PER_S]:,.0f} tok/s"
            if metrics.BALANCE in line:
                figures += f"  balance {line[metrics.BALANCE]:.2f}"
            self._progress.update(self._task, completed=line[metrics.STEP], figures=figures, description="training")
            if metrics.VAL_LOSS in line:
                loss = line[metrics.VAL_LOSS]
                note.print(f"step {line[metrics.STEP]}: validation loss {loss:.4f}, {figures}", soft_wrap=True)

    def _say(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self._progress.update(self._task, description=kind)
        if kind == "preparing":
            note.print(f"preparing data in {event['folder']}", soft_wrap=True)
        elif kind == "started":
            again = "" if event["group"] == 1 else f", start {event['group']} of the workers"
            places = f"{len(event['workers'])} workers, dp {event['dp']} x ep {event['ep']}"
            note.print(f"training from step {event['step']} on {places}{again}")
