"""Follow a run to its end by its directory and its job, and show the progress of data preparation."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from mhmoe_ray.cli.common import detaching, figure, in_bytes, nats, note, out, say
from mhmoe_ray.cli.jobs import name_of

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.runs import Outcome
    from mhmoe_ray.data.prepare.work import PreparationProgress
    from mhmoe_ray.runs.directory import RunDir


EVERY_SECONDS = 10.0
"""Seconds between progress lines, if there is no terminal on which one line can be redrawn."""


class PreparingView:
    """Progress of data preparation: a task of a progress bar on a terminal, lines elsewhere.

    Args:
        work: folder of the preparation.
        bar: the progress bar, which may have other tasks.
    """

    def __init__(self, work: Path, bar: Bar) -> None:
        self._work, self._bar = work, bar
        self._task: TaskID | None = None
        self._told, self._stage = 0.0, ""

    def refresh(self) -> None:
        from mhmoe_ray.data.prepare.work import read_progress

        progress = read_progress(self._work)
        if progress is None:
            self.close()
            return
        if self._task is None:
            self._task = self._bar.add_task("", figures="")
        stage = progress.stage if progress.stage != "tokenizer" else "training the tokenizer"
        percent = round(100 * progress.done / progress.total) if progress.total else 0
        self._bar.update(self._task, description=stage, completed=percent, total=100, figures=text(progress))
        due = progress.stage != self._stage or time.monotonic() - self._told > EVERY_SECONDS
        if due and not note.is_terminal:
            self._told, self._stage = time.monotonic(), progress.stage
            note.print(f"prepare: {stage} {text(progress)}".rstrip(), soft_wrap=True)

    def close(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def text(progress: "PreparationProgress") -> str:
    """Return the figures of a preparation's progress in one line; empty if the stage has none."""
    if progress.stage == "packing":
        return f"{progress.done:,} of {progress.total:,} shards"
    if progress.stage != "tokenising":
        return ""
    parts = [
        f"{in_bytes(progress.done)} of {in_bytes(progress.total)}",
        f"{progress.documents:,} documents",
        f"{progress.tokens:,} tokens",
    ]
    if progress.found_tokens:
        parts.append(f"{progress.found_tokens:,} from before")
    if progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        parts += [f"{progress.bytes_per_s / 1e6:.2f} MB/s", f"{minutes}:{seconds:02d} left"]
    return ", ".join(parts)


POLL_SECONDS = 0.5
ASK_SECONDS = 5.0  # between questions to the cluster; the directory is read at every poll


def follow(run: "RunDir", connection: "Connection", *, from_now: bool = False, for_ever: bool = False) -> None:
    """Show progress until the run is over: a bar on a terminal, elsewhere a line at each validation.

    Args:
        run: the run.
        connection: connection to the cluster that the run's newest job is on.
        from_now: leave out what is already in the run directory.
        for_ever: keep waiting for a cluster or a storage that does not answer.

    Raises:
        JobError: the run failed; the error holds the reason.
        ClusterError, StorageError: the cluster or the storage no longer answers.
    """
    from mhmoe_ray.checkpoint.manifest import last_step
    from mhmoe_ray.errors import JobError

    name = name_of(run)
    hint = f"the run goes on. See: mhmoe status {name}; to end it: mhmoe stop {name}"
    with detaching(hint), _bar() as progress:
        view = _View(run, progress, from_now)
        over = _watch(run, connection, view, for_ever)
        view.refresh()
    if over.state == "failed":
        _show_last_lines(run)
        raise JobError(f"run {run.id}", over.reason, f"see `mhmoe logs {name}`, then `mhmoe resume {name}`")
    out.print(f"run {run.id} {over.state} at step {last_step(run)}")


def _show_last_lines(run: "RunDir") -> None:
    """Print the last lines of the worker that failed last, if a worker failed."""
    from mhmoe_ray.runs import events

    lost = events.newest(events.events(run), "lost")
    if lost and lost["lines"]:
        note.print(f"last lines of rank {lost['rank']} on {lost['host']}:")
        for line in lost["lines"]:
            note.print(f"  {line}", soft_wrap=True, style="dim")


def _watch(run: "RunDir", connection: "Connection", view: "_View", for_ever: bool) -> "Outcome":
    """Refresh the view until the run is over, and return how it ended.

    A cluster or a storage that is slow to answer does not end the wait.
    """
    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.cluster.runs import outcome, recorded_outcome

    asked, patience = time.monotonic(), Patience(say, for_ever=for_ever)
    while True:
        patience.ask(view.refresh, None)
        over = recorded_outcome(view.happened)
        if over is None and time.monotonic() - asked > ASK_SECONDS:
            over = patience.ask(lambda: outcome(run, connection), None)
            asked = time.monotonic()
        if over:
            return over
        time.sleep(POLL_SECONDS)


def _bar() -> Progress:
    text = TextColumn("{task.fields[figures]}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(compact=True), text, console=note, disable=not note.is_terminal)


class _View:
    def __init__(self, run: "RunDir", progress: Progress, from_now: bool) -> None:
        from mhmoe_ray.data.prepare.work import shared_folder
        from mhmoe_ray.runs.jsonl import Tail

        self.happened: list[dict[str, Any]] = []
        """Events that were shown. In an object store each event is a file of its own; none is read twice."""
        self._progress = progress
        self._task = progress.add_task("submitted", total=run.spec().train.steps, figures="")
        self._metrics = Tail(run.metrics_file, from_now=from_now)
        self._events = Tail(run.events_file, from_now=from_now)
        self._preparing = PreparingView(shared_folder(run.spec()), progress)

    def refresh(self) -> None:
        from mhmoe_ray.runs import metrics

        for event in self._events.new():
            self.happened.append(event)
            self._say(event)
        self._preparing.refresh()
        for line in self._metrics.new():
            figures = f"loss {nats(line[metrics.LOSS])}  {line[metrics.TOKENS_PER_S]:,.0f} tok/s"
            if metrics.BALANCE in line:
                figures += f"  balance {figure(line[metrics.BALANCE], '.2f')}"
            self._progress.update(self._task, completed=line[metrics.STEP], figures=figures, description="training")
            if metrics.VAL_LOSS in line:
                loss = nats(line[metrics.VAL_LOSS])
                note.print(f"step {line[metrics.STEP]}: validation loss {loss}, {figures}", soft_wrap=True)
            if metrics.SKIPPED in line:
                note.print(f"warning: step {line[metrics.STEP]} updated nothing: its gradient was not finite")

    def _say(self, event: dict[str, Any]) -> None:
        from mhmoe_ray.runs import events

        kind = event["event"]
        self._progress.update(self._task, description=kind)
        if kind == "began":
            note.print(f"its job runs on {event['host']}")
        elif kind == "preparing":
            note.print(f"preparing data in {event['folder']}", soft_wrap=True)
        elif kind == "waiting":
            note.print(f"waiting for room: {event.get('missing', 'the cluster has none for its workers now')}")
        elif kind == "started":
            again = "" if event["group"] == 1 else f", start {event['group']} of the workers"
            places = f"{events.workers(event)} workers, {events.mesh(event)}"
            note.print(f"training from step {event['step']} on {places}{again}")
            if warning := events.straddling(event):
                note.print(f"warning: {warning}")
        elif kind == "lost":
            note.print(f"warning: {events.lost(event)}", soft_wrap=True)
        elif kind == "hung":
            note.print(f"warning: {events.hung(event)}", soft_wrap=True)
        elif kind == "skipped_checkpoint":
            note.print(f"warning: {event['name']}: {event['reason']}; the one before is used", soft_wrap=True)
        elif kind == "preempted":
            note.print(events.preempted(event), soft_wrap=True)
