"""Follow a run to its end through its directory and its job, and show the progress of data preparation."""

import time
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.formats import format_bytes, format_figure, format_nats
from mhmoe_ray.cli.output import activity_lines, detach_from_job, detach_on_interrupt, note, out, print_note
from mhmoe_ray.terminal import Activity

if TYPE_CHECKING:
    from mhmoe_ray.cluster.remote import SubmittedJob
    from mhmoe_ray.data.prepare.work import PreparationProgress
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.storage import Location


POLL_SECONDS = 0.5
EVENT_ACTIVITIES = {
    "submitted": "waiting for the job to start", "began": "checking the data", "preparing": "preparing data:",
    "prepared": "starting workers", "waiting": "waiting for resources", "restoring": "loading the model",
    "started": "training:", "lost": "starting workers again", "preempted": "starting workers again",
}  # fmt: skip
"""What a run does after an event, by the kind of the event; other events change nothing."""


def follow_preparation(job: "SubmittedJob[DataManifest]", folder: "Location") -> None:
    """Show the progress of the job that prepares data in a work folder, until it ends or the user presses Ctrl-C."""
    from mhmoe_ray.cluster.dashboard import RetryingCaller

    activity_lines.show(Activity(EVENT_ACTIVITIES["submitted"]))
    retrying_caller = RetryingCaller(print_note)
    with detach_from_job(job):
        while retrying_caller.call(lambda: job.is_running, True):
            show_preparation(folder)
            time.sleep(POLL_SECONDS)


def show_preparation(folder: "Location") -> None:
    """Show the progress of the preparation with this work folder, if it runs."""
    from mhmoe_ray.data.prepare.work import read_progress

    if progress := read_progress(folder):
        print_note(Activity("preparing data:", format_progress(progress), progress.done, progress.total))


def format_progress(progress: "PreparationProgress") -> str:
    """Return the stage of a preparation's progress, with its counts if it has any, as one line."""
    if progress.stage == "packing":
        return f"packing {progress.done:,} of {progress.total:,} shards"
    if progress.stage in ("tokenizer", "finishing"):
        return {"tokenizer": "training the tokenizer", "finishing": "finishing"}[progress.stage]
    size = f"{progress.stage} {format_bytes(progress.done)} of {format_bytes(progress.total)}"
    parts = [size, f"{progress.documents:,} documents"]
    if progress.stage == "tokenising":
        parts.append(f"{progress.tokens:,} tokens")
    if progress.found_tokens:
        parts.append(f"{progress.found_tokens:,} of them tokenised earlier")
    return ", ".join(parts)


def follow_run(run: "RunDir", *, from_now: bool = False, for_ever: bool = False) -> None:
    """Show a run's events and progress until it is over: its steps on a terminal, elsewhere a line at each validation.

    `from_now` leaves out what the run directory holds already. The failure of the run is a JobError. A cluster or
    storage that has not answered for a while is an error, unless `for_ever`.
    """
    from mhmoe_ray.api.attempts import failure_error, run_argument, wait_for_outcome
    from mhmoe_ray.checkpoint.manifest import last_step

    name = run_argument(run)
    hint = f"the run goes on. See: mhmoe status {name}; to end it: mhmoe stop {name}"
    with detach_on_interrupt(hint):
        view = _RunView(run, from_now)
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


class _RunView:
    """View of a run that is followed: lines for its events and validations, and its activity, steps and metrics."""

    def __init__(self, run: "RunDir", from_now: bool) -> None:
        from mhmoe_ray.api.attempts import run_argument
        from mhmoe_ray.data.prepare.work import shared_folder
        from mhmoe_ray.runs import events, history, metrics
        from mhmoe_ray.runs.jsonl import Tail

        self._name = run_argument(run)
        self.shown_events: list[dict[str, Any]] = []
        """All events that were shown so far. In an object store each event is a file of its own, so none is read
        twice."""
        self._steps, self._folder = run.spec().train.steps, shared_folder(run.spec())
        self._metrics = Tail(run.metrics_file, metrics.parse_line, from_now=from_now)
        self._events = Tail(run.events_file, events.parse, from_now=from_now)
        kinds = [event["event"] for event in events.read(run) if event["event"] in EVENT_ACTIVITIES] if from_now else []
        last_line = history.last_line(run) if from_now else None
        self._show(kinds[-1] if kinds else "submitted", last_line[metrics.STEP] if last_line else 0)

    def refresh(self) -> list[dict[str, Any]]:
        """Show new events and metrics, and the progress of data preparation; return all events that were shown."""
        from mhmoe_ray.runs import metrics

        for event in self._events.new_lines():
            self.shown_events.append(event)
            self._print_event(event)
        if self._kind == "preparing":
            show_preparation(self._folder)
        for line in self._metrics.new_lines():
            figures = f"loss {format_nats(line[metrics.LOSS])}  {line[metrics.TOKENS_PER_S]:,.0f} tok/s"
            if metrics.BALANCE in line:
                figures += f"  balance {format_figure(line[metrics.BALANCE], '.2f')}"
            self._show("started", line[metrics.STEP], f"  {figures}")
            if metrics.VAL_LOSS in line:
                loss = format_nats(line[metrics.VAL_LOSS])
                print_note(f"step {line[metrics.STEP]}: validation loss {loss}, {figures}")
            if metrics.SKIPPED in line and line.get(metrics.GRAD_NORM) is None:
                note.print(f"warning: step {line[metrics.STEP]} updated nothing: its gradient was not finite")
        return self.shown_events

    def _show(self, kind: str, step: int = 0, figures: str = "") -> None:
        """Show on a terminal what the run does after an event of this kind, with its step if it trains."""
        self._kind, activity = kind, Activity("ending the run" if kind == "started" else EVENT_ACTIVITIES[kind])
        if kind == "started" and step < self._steps:
            details = f"{step:,} of {self._steps:,} steps{figures}"
            activity = Activity(EVENT_ACTIVITIES[kind], details, step, self._steps)
        activity_lines.show(activity)

    def _print_event(self, event: dict[str, Any]) -> None:
        from mhmoe_ray.runs import events

        kind = event["event"]
        if kind in EVENT_ACTIVITIES:
            self._show(kind, event.get("step", 0))
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
        elif kind == "spike":
            step = event["step"]
            note.print(f"warning: step {step} is a spike and updated nothing: {event['reason']}")
            print_note(f"its documents: mhmoe data at {self._name}@{step}")
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
