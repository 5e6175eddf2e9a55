"""Process of a run's job: record that it has begun, train, and record in the run directory how it ended."""

import os
import socket
from typing import ClassVar, Literal

from mhmoe_ray.errors import MhmoeError, StorageError, logging_errors
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, newest_number, require_newest
from mhmoe_ray.runs.logs import keep_log
from mhmoe_ray.storage import location


class TrainRequest(RemoteJob[None]):
    """Request for one attempt of a run.

    Its results are in the run directory, where events say how it ended.
    """

    module: ClassVar[str] = "mhmoe_ray.train.job"
    kind: ClassVar[str] = "train"

    path: str
    """Path of the run directory, whose name is the run's id."""
    attempt: int

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
    request = TrainRequest.received()
    run, attempt = request.run, request.attempt
    with logging_errors():
        require_newest(run, attempt)  # it may have waited for long
        keep_log(run, attempt)
        events.record(run, "began", attempt=attempt, host=socket.gethostname(), pid=os.getpid())
        _train(run, attempt)


def _train(run: RunDir, attempt: int) -> None:
    try:
        # Imported only now: they take seconds, for which whoever submitted the run would see nothing.
        import ray

        from mhmoe_ray.train.driver import drive

        # Actors of Ray's own look for "the" cluster of a machine, which may have several.
        ray.init(runtime_env={"env_vars": {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}})
        drive(run, attempt)
    except MhmoeError as e:
        _record_end(run, attempt, "failed", reason=str(e))
        raise
    except SystemExit as e:  # Ray turns SIGTERM, with which it stops a job, into this
        if run.stop_file.exists():
            _record_end(run, attempt, "stopped", reason="its job was ended")
        else:
            _record_end(run, attempt, "failed", reason=f"its job was ended from outside ({e})")
        raise
    except BaseException as e:
        _record_end(run, attempt, "failed", reason=f"{type(e).__name__}: {e}".splitlines()[0])
        raise


def _record_end(run: RunDir, attempt: int, kind: Literal["failed", "stopped"], reason: str) -> None:
    """Record how this attempt ended, unless a later attempt has taken over: then this end is not the end of the run.

    If the event cannot be written, the storage error and the reason are printed to the job's log instead.
    """
    if newest_number(run) == attempt:
        try:
            events.record(run, kind, reason=reason)
        except StorageError as e:  # the job's log has both, and `status` takes the reason from there
            e.log()
            if str(e) != reason:
                print(reason)


if __name__ == "__main__":
    main()
