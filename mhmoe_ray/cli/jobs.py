"""Following of a command's jobs."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import detach_on_interrupt, print_note

if TYPE_CHECKING:
    from mhmoe_ray.cluster.remote import SubmittedJob


def detach_from_job(job: "SubmittedJob[Any]") -> AbstractContextManager[None]:
    """Return a context in which Ctrl-C ends the command and prints that the job goes on."""
    return detach_on_interrupt(f"job {job.name} goes on; see it in the dashboard, {job.connection.address}")


def follow_job(job: "SubmittedJob[Any]") -> None:
    """Print the lines that a job writes for the user, until the job ends."""
    with detach_from_job(job):
        for line in job.progress():
            print_note(line)
