"""Follow jobs that a command has started: print their progress until they end, and let them go on after Ctrl-C."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import detach_on_interrupt, print_note

if TYPE_CHECKING:
    from mhmoe_ray.cluster.remote import SubmittedJob


def detach_from_job(job: "SubmittedJob[Any]", hint: str | None = None) -> AbstractContextManager[None]:
    """Return a context in which Ctrl-C ends the command, and prints that the job goes on with `hint` or the dashboard's
    address."""
    hint = hint or f"see it in the dashboard, {job.connection.address}"
    return detach_on_interrupt(f"job {job.name} goes on; {hint}")


def follow_job(job: "SubmittedJob[Any]", hint: str | None = None) -> None:
    """Print the lines that a job writes for the user, until the job ends or the user presses Ctrl-C."""
    with detach_from_job(job, hint):
        for line in job.progress():
            print_note(line)
