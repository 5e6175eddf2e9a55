"""Find a checkpoint of a run as users name it: by its name, by its step, or by run and step as RUN@STEP."""

from mhmoe_ray.checkpoint.manifest import committed_checkpoints, step_and_group
from mhmoe_ray.errors import CheckpointError, RunError, StorageError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir, find_run
from mhmoe_ray.storage import Location

SHOWN_CHECKPOINTS = 10
"""Largest number of existing checkpoints, newest first, in the error about an unknown checkpoint."""


def find_checkpoint(run: RunDir, checkpoint: str | int) -> Location:
    """Return the path of a run's committed checkpoint by its name or its step (an integer or a string of digits).

    For a step with several checkpoints, this is the newest one. Its files are not verified; an unknown checkpoint is a
    CheckpointError.
    """
    checkpoints = committed_checkpoints(run)
    if isinstance(checkpoint, int) or checkpoint.isdecimal():
        step = int(checkpoint)
        matching_paths = [path for path in checkpoints if step_and_group(path)[0] == step]
        reason = f"run {run.id} has no checkpoint of this step"
    else:
        matching_paths = [path for path in checkpoints if path.name == checkpoint]
        reason = f"run {run.id} has no checkpoint of this name"
    if matching_paths:
        return matching_paths[-1]
    if not checkpoints:
        raise no_checkpoint_error(run)
    names = [path.name for path in reversed(checkpoints)]
    name_list = ", ".join(names[:SHOWN_CHECKPOINTS])
    if len(names) > SHOWN_CHECKPOINTS:
        name_list += f" and {len(names) - SHOWN_CHECKPOINTS:,} older ones"
    raise CheckpointError(f"checkpoint {checkpoint}", reason, f"choose from {name_list}")


def split_step(run: str | None, checkpoint: str | None = None) -> tuple[str | None, str | None]:
    """Return the run and the checkpoint that a user names, of which the run may be RUN@STEP."""
    name, _, step = (run or "").rpartition("@")
    return (name, step) if name and step.isdecimal() and checkpoint is None else (run, checkpoint)


def no_checkpoint_error(run: RunDir) -> CheckpointError:
    """Return the error for a run without any checkpoint. It tells the user whether the run may still save one."""
    state = events.state(events.read(run))
    if events.is_end_state(state):
        return CheckpointError(f"run {run.id}", f"it is {state} and has no checkpoint", "use another run, or resume it")
    return CheckpointError(f"run {run.id}", "it has no checkpoint yet", "wait for one, or use another run")


def find_run_or_checkpoint(source: str, storage: Location | str, subject: str) -> RunDir | Location:
    """Return the run that `source` names by its id or path, or the checkpoint that it names as RUN@STEP.

    The caller has checked that `source` is not the folder of a checkpoint or a model. Error messages call it `subject`.
    An unknown run is a RunError, an unknown step a CheckpointError.
    """
    name, step = split_step(source)
    try:
        run = find_run(name, storage)
        return find_checkpoint(run, step) if step else run
    except StorageError:
        raise
    except RunError as e:
        fix = "name a run, RUN@STEP, the folder of a checkpoint or a model, or hf:ORGANIZATION/NAME"
        raise RunError(subject, f"there is no such folder, and as a run: {e.reason}", fix) from e
    except CheckpointError as e:
        raise CheckpointError(subject, e.reason, e.fix) from e
