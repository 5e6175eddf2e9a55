"""Entry point of the Ray job that trains a run: it records its start, trains, and records how the training ended."""

import os
import socket
from typing import ClassVar, Literal

from mhmoe_ray.errors import MhmoeError, StorageError, logging_errors
from mhmoe_ray.remote import RemoteJob, init_ray
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import AttemptId, RunDir, is_newest_attempt, require_newest_attempt
from mhmoe_ray.runs.logs import Redactor, archive_log
from mhmoe_ray.storage import location


class TrainRequest(RemoteJob[None]):
    """Request for a Ray job that trains one attempt of a run. Its results are in the run directory: checkpoints,
    metrics and events."""

    module: ClassVar[str] = "mhmoe_ray.train.job"
    kind: ClassVar[str] = "train"

    path: str  # run directory, whose name is the run's id
    attempt: int
    token: str = ""  # of the attempt's `Attempt`

    @property
    def run(self) -> RunDir:
        return RunDir(location(self.path))

    @property
    def job_name(self) -> str:
        return f"{self.run.id}-{self.attempt}"

    @property
    def metadata(self) -> dict[str, str]:
        return {"mhmoe_run": self.run.id, "mhmoe_path": self.path}


def main() -> None:
    """Train as the job's `TrainRequest` asks, unless the run has a newer attempt; after an error, exit with its
    code."""
    request = TrainRequest.received()
    run, attempt = request.run, AttemptId(request.attempt, request.token)
    with logging_errors():
        # The job may have waited for resources for a long time. If a newer attempt was submitted meanwhile, this job
        # must write nothing.
        require_newest_attempt(run, attempt)
        archive_log(run, attempt.number)
        events.record(run, "began", attempt=attempt.number, host=socket.gethostname(), pid=os.getpid())
        _train_and_record(run, attempt)


def _train_and_record(run: RunDir, attempt: AttemptId) -> None:
    """Train a run; if this fails or is ended from outside, record the reason as an event and raise the error again."""
    try:
        # This import comes after the "began" event, because it takes seconds and the user waits for that event.
        from mhmoe_ray.train.driver import train_run

        init_ray()
        train_run(run, attempt)
    except MhmoeError as e:
        _record_end(run, attempt, "failed", reason=str(e))
        raise
    except SystemExit as e:
        # Ray stops a job with SIGTERM, and Ray's signal handler in this process turns the signal into a SystemExit.
        if run.stop_file.exists():
            _record_end(run, attempt, "stopped", reason="its job was ended")
        else:
            _record_end(run, attempt, "failed", reason=f"its job was ended from outside ({e})")
        raise
    except BaseException as e:
        _record_end(run, attempt, "failed", reason=f"{type(e).__name__}: {e}".splitlines()[0])
        raise


def _record_end(run: RunDir, attempt: AttemptId, kind: Literal["failed", "stopped"], reason: str) -> None:
    """Record how this attempt ended, unless the run has a newer one. Secrets in the reason are replaced. If the event
    cannot be written, the storage error and the reason are printed to the job's log instead."""
    # If a newer attempt was submitted, the run goes on with it, so the end of this attempt is not the end of the run.
    if is_newest_attempt(run, attempt):
        try:
            events.record(run, kind, reason=Redactor(os.environ)(reason))
        except StorageError as e:
            # The event of a failed attempt has its reason. If the event cannot be written, `mhmoe status` takes the
            # reason from the job's log.
            e.log()
            if str(e) != reason:
                print(reason)


if __name__ == "__main__":
    main()
