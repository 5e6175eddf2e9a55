"""Follow a run to its end through its directory and its job, and show the progress of data preparation."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mhmoe_ray.cli.formats import format_bytes, format_figure, format_nats
from mhmoe_ray.cli.output import detach_on_interrupt, note, out, print_note

if TYPE_CHECKING:
    from mhmoe_ray.data.prepare.work import PreparationProgress
    from mhmoe_ray.runs.directory import RunDir


LINE_SECONDS = 10.0
"""Seconds between two progress lines if the output is not a terminal, on which one line would be redrawn."""


class PreparationView:
    """View of the progress of data preparation: a task of a progress bar on a terminal, printed lines elsewhere.

    The bar may have other tasks; `folder` is the work folder of the preparation.
    """

    def __init__(self, folder: Path, bar: Progress) -> None:
        self._folder, self._bar = folder, bar
        self._task: TaskID | None = None
        self._print_time, self._printed_stage = 0.0, ""

    def refresh(self) -> None:
        """Read and show the progress of the preparation; remove its task from the bar if no preparation is running."""
        from mhmoe_ray.data.prepare.work import read_progress

        progress = read_progress(self._folder)
        if progress is None:
            self.close()
            return
        if self._task is None:
            self._task = self._bar.add_task("", figures="")
        stage = progress.stage if progress.stage != "tokenizer" else "training the tokenizer"
        percent = round(100 * progress.done / progress.total) if progress.total else 0
        self._bar.update(self._task, description=stage, completed=percent, total=100, figures=format_progress(progress))
        # Without a terminal, a line is printed when a stage begins, and from time to time during a long stage.
        is_due = progress.stage != self._printed_stage or time.monotonic() - self._print_time > LINE_SECONDS
        if is_due and not note.is_terminal:
            self._print_time, self._printed_stage = time.monotonic(), progress.stage
            print_note(f"prepare: {stage} {format_progress(progress)}".rstrip())

    def close(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def format_progress(progress: "PreparationProgress") -> str:
    """Return the counts of a preparation's progress as one line, which is empty for a stage without counts."""
    if progress.stage == "packing":
        return f"{progress.done:,} of {progress.total:,} shards"
    if progress.stage in ("tokenizer", "finishing"):
        return ""
    parts = [f"{format_bytes(progress.done)} of {format_bytes(progress.total)}", f"{progress.documents:,} documents"]
    if progress.stage == "tokenising":
        parts.append(f"{progress.tokens:,} tokens")
    if progress.found_tokens:
        parts.append(f"{progress.found_tokens:,} of them tokenised earlier")
    if progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        parts += [f"{progress.bytes_per_s / 1e6:.2f} MB/s", f"{minutes}:{seconds:02d} left"]
    return ", ".join(parts)


def follow_run(run: "RunDir", *, from_now: bool = False, for_ever: bool = False) -> None:
    """Show a run's events and progress until it is over: a bar on a terminal, elsewhere a line at each validation.

    `from_now` leaves out what the run directory holds already. The failure of the run is a JobError. A cluster or
    storage that has not answered for a while is an error, unless `for_ever`.
    """
    from mhmoe_ray.api.attempts import failure_error, run_argument, wait_for_outcome
    from mhmoe_ray.checkpoint.manifest import last_step

    name = run_argument(run)
    hint = f"the run goes on. See: mhmoe status {name}; to end it: mhmoe stop {name}"
    with detach_on_interrupt(hint), _run_progress_bar() as progress:
        view = _RunView(run, progress, from_now)
        outcome = wait_for_outcome(run, view.refresh, is_endless=for_ever, on_note=print_note)
        # The run may have written events and metrics since the last refresh, so the view is refreshed once more.
        view.refresh()
    if outcome.state == "failed":
        _print_last_lines(run)
        raise failure_error(run, outcome)
    out.print(f"run {run.id} {outcome.state} at step {last_step(run)}")


def _print_last_lines(run: "RunDir") -> None:
    from mhmoe_ray.runs import events

    lost_event = events.last_loss(events.read(run))
    if lost_event and lost_event["lines"]:
        note.print(f"last lines of rank {lost_event['rank']} on {lost_event['host']}:")
        for line in lost_event["lines"]:
            note.print(f"  {line}", soft_wrap=True, style="dim")


def progress_bar(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """Return a progress bar on stderr, which is shown on a terminal only: description, bar, `columns`, and figures."""
    first_columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20))
    figures = TextColumn("{task.fields[figures]}")
    return Progress(*first_columns, *columns, figures, console=note, disable=not note.is_terminal, transient=transient)


def _run_progress_bar() -> Progress:
    return progress_bar(MofNCompleteColumn(), TimeRemainingColumn(compact=True))


class _RunView:
    """View of a run that is followed: lines for its events and validations, and a bar for its steps and metrics."""

    def __init__(self, run: "RunDir", progress: Progress, from_now: bool) -> None:
        from mhmoe_ray.data.prepare.work import shared_folder
        from mhmoe_ray.runs import events, metrics
        from mhmoe_ray.runs.jsonl import Tail

        self.shown_events: list[dict[str, Any]] = []
        """All events that were shown so far. In an object store each event is a file of its own, so none is read
        twice."""
        self._progress = progress
        self._task = progress.add_task("submitted", total=run.spec().train.steps, figures="")
        self._metrics = Tail(run.metrics_file, metrics.parse_line, from_now=from_now)
        self._events = Tail(run.events_file, events.parse, from_now=from_now)
        self._preparation = PreparationView(shared_folder(run.spec()), progress)

    def refresh(self) -> list[dict[str, Any]]:
        """Show new events and metrics, and the progress of data preparation; return all events that were shown."""
        from mhmoe_ray.runs import metrics

        for event in self._events.new_lines():
            self.shown_events.append(event)
            self._print_event(event)
        self._preparation.refresh()
        for line in self._metrics.new_lines():
            figures = f"loss {format_nats(line[metrics.LOSS])}  {line[metrics.TOKENS_PER_S]:,.0f} tok/s"
            if metrics.BALANCE in line:
                figures += f"  balance {format_figure(line[metrics.BALANCE], '.2f')}"
            self._progress.update(self._task, completed=line[metrics.STEP], figures=figures, description="training")
            if metrics.VAL_LOSS in line:
                loss = format_nats(line[metrics.VAL_LOSS])
                print_note(f"step {line[metrics.STEP]}: validation loss {loss}, {figures}")
            if metrics.SKIPPED in line:
                note.print(f"warning: step {line[metrics.STEP]} updated nothing: its gradient was not finite")
        return self.shown_events

    def _print_event(self, event: dict[str, Any]) -> None:
        from mhmoe_ray.runs import events

        kind = event["event"]
        self._progress.update(self._task, description=kind)
        if kind == "began":
            note.print(f"its job runs on {event.get('host', 'a node that is not known')}")
        elif kind == "preparing":
            print_note(f"preparing data in {event['folder']}")
        elif kind == "initialized":
            print_note(f"starting from {'; '.join(event['sources'])}")
        elif kind == "waiting":
            note.print(f"waiting for resources: {event.get('missing', 'the cluster has none free for the workers')}")
        elif kind == "started":
            # The first group of workers is not a restart, so its line has no note.
            restart_note = "" if event["group"] == 1 else f", start {event['group']} of the workers"
            workers = events.describe_workers(event)
            layout = f"{workers} worker{'' if workers == '1' else 's'}, {events.describe_mesh(event)}"
            note.print(f"training from step {event['step']} on {layout}{restart_note}")
            if warning := events.describe_straddling_groups(event):
                note.print(f"warning: {warning}")
        elif kind == "adapted":
            note.print(f"step {event['step']:,}: task {event['task']} chooses {event['top_k']} experts")
        elif kind == "lost":
            print_note(f"warning: {events.describe_failure(event)}")
        elif kind == "hung":
            print_note(f"warning: {events.describe_hang(event)}")
        elif kind == "skipped_checkpoint":
            print_note(f"warning: {event['name']}: {event['reason']}; the previous one is used")
        elif kind == "preempted":
            print_note(events.describe_preemption(event))
