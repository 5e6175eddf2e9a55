"""View of the progress of a sweep, which `mhmoe sweep` shows until the sweep's runs are over."""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.formats import format_nats
from mhmoe_ray.cli.output import activity_lines, detach_on_interrupt, note, print_note
from mhmoe_ray.terminal import Activity

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.runs.sweeps import SweepDir, SweepOrder


POLL_SECONDS = 1.0
# Seconds between two requests to the cluster. Run directories, which show the progress, are read more often.
JOB_CHECK_SECONDS = 5.0
# Largest number of restarts of a sweep's job that ended without logging an error, for example because it was killed.
# Without a limit, a job that always ends in this way would be restarted forever.
MAX_RESTARTS = 3


def follow_order(directory: "SweepDir", name: str, connection: "Connection") -> None:
    """Show the progress of an order until its runs are over or a stop is requested.

    If the job that starts the runs was killed, it is restarted at most `MAX_RESTARTS` times; if it ends once more, the
    function returns. The job's own error is raised, and those of a cluster or storage that no longer answers.
    """
    from mhmoe_ray.cluster.dashboard import RetryingCaller
    from mhmoe_ray.sweep import client

    restarts, check_time, note_printed, job_end_time = 0, time.monotonic(), False, 0.0
    caller = RetryingCaller(print_note)
    hint = "the sweep goes on. The same command follows it again, and ends it with --stop"
    with detach_on_interrupt(hint):
        view = _ProgressView(directory, directory.read_order(name))
        while not caller.call(view.refresh, False):
            time.sleep(POLL_SECONDS)
            if time.monotonic() - check_time < JOB_CHECK_SECONDS:
                continue
            order_state = caller.call(partial(_newest_order, directory), None)
            if order_state is None:
                continue
            newest_name, order, stop_requested = order_state
            if newest_name != name and not note_printed:
                note.print("another command asked for runs of this sweep; its job also starts the runs of this command")
                note_printed = True
            is_alive = caller.call(partial(client.is_alive, order), True)
            check_time = time.monotonic()
            if is_alive:
                job_end_time = 0.0
                continue
            if stop_requested or caller.call(view.refresh, False):
                return
            job_end_time = job_end_time or check_time
            # During the calls above, a stop may have ended its job, or another command may have written a newer order.
            later_state = caller.call(partial(_newest_order, directory), None)
            if later_state and later_state[2]:
                return
            if (
                later_state is None
                or later_state[0] != newest_name
                or (newest_name != name and check_time - job_end_time < 2 * JOB_CHECK_SECONDS)
            ):
                # Another `mhmoe sweep` command may still follow this order. It can then restart the job first.
                continue
            if error := client.logged_error(order):
                # If another command wrote this order, that command shows the error.
                if newest_name != name:
                    return
                raise error
            if restarts == MAX_RESTARTS:
                return
            restarts += 1
            note.print("the job that starts the runs has ended; it is started again")
            name = client.restart_job(directory, connection, order)


def _newest_order(directory: "SweepDir") -> "tuple[str, SweepOrder, bool]":
    """Return the name of a sweep's newest order, the order itself, and whether a stop of the sweep is requested."""
    newest_name = directory.order_names()[-1]
    return newest_name, directory.read_order(newest_name), directory.stop_file.exists()


class _ProgressView:
    """View of the progress of the runs that an order starts: lines on a terminal, printed changes elsewhere."""

    def __init__(self, directory: "SweepDir", order: "SweepOrder") -> None:
        self._directory, self._order = directory, order
        self._entries = order.wanted_entries
        self._printed_states: dict[str, str] = {}

    def refresh(self) -> bool:
        """Show the runs' states and steps as their directories have them now, and return whether all runs are over."""
        from mhmoe_ray.runs import history, metrics
        from mhmoe_ray.sweep.client import is_to_run, state_of

        runs, ended_count = self._directory.runs(), 0
        for entry in self._entries:
            if (run := runs.get(entry.name)) is None:
                continue
            # A finished run stays finished, so its directory need not be read again.
            if self._printed_states.get(entry.name) == "finished":
                ended_count += 1
                continue
            state = state_of(run)
            ended_count += not is_to_run(entry.name, run, state, self._order)
            last_metrics = history.last_line(run) if run.metrics_file.exists() else None
            if self._printed_states.get(entry.name) != state:
                self._printed_states[entry.name] = state
                if not note.is_terminal and state != "submitted":
                    step_text = f" at step {last_metrics[metrics.STEP]}" if last_metrics else ""
                    note.print(f"{entry.name}: {state}{step_text}")
            _show_run(entry.name, state, entry.spec.train.steps, last_metrics)
        run_count = len(self._entries)
        details = f"{ended_count} of {run_count} are over"
        activity_lines.show(Activity("training runs:", details, ended_count, run_count))
        return ended_count == run_count


def _show_run(name: str, state: str, steps: int, last_metrics: dict[str, Any] | None) -> None:
    from mhmoe_ray.runs import events, metrics

    if events.is_end_state(state):
        activity_lines.hide(name)
        return
    step = last_metrics[metrics.STEP] if last_metrics else 0
    details = f"{step:,} of {steps:,} steps  loss {format_nats(last_metrics[metrics.LOSS])}" if last_metrics else state
    activity_lines.show(Activity(f"  {name}:", details, step, steps), name)
