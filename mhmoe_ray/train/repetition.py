"""Repetition of a run's last recorded steps, which proves that the run can be resumed: `mhmoe resume --check`.

The steps between the newest checkpoint and the one before are trained again by `train_run`, in a folder of their own
beside the run. Their losses, gradient norms and samples, and the checkpoint at their end, are compared with the run's.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel

from mhmoe_ray.checkpoint.find import no_checkpoint_error
from mhmoe_ray.checkpoint.manifest import (
    MANIFEST,
    PARTS,
    CheckpointManifest,
    checkpoint_name,
    committed_checkpoints,
    newest_checkpoint,
    read_manifest,
    step_and_group,
    stored_manifest,
)
from mhmoe_ray.errors import CheckpointError, DataError, JobError, MhmoeError, RunError
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import AttemptId, RunDir, create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.spec.train import TrackingSpec
from mhmoe_ray.storage import Location, copy_file, create_file, location, remove_tree

if TYPE_CHECKING:
    from torch import Tensor

GPU_TOLERANCE = 0.02
"""Largest relative difference of a repetition on GPUs, where atomic additions sum in another order each time. It is
what the tests of equivalence allow gradients in bfloat16 that are summed in another order. No GPU has checked it."""
COMPARED_METRICS = {metrics.LOSS: "loss", metrics.GRAD_NORM: "gradient norm", metrics.STREAM: "samples"}
"""Metrics of each step that are compared, with their names in messages."""
_COPY_BYTES = 16 << 20

Values = dict[str, float | str | None]


class RepeatedStep(BaseModel):
    """A step of a run and its repetition."""

    step: int
    recorded: Values
    """Metrics of the run, by name; none if metrics.jsonl lacks the step."""
    repeated: Values
    different: list[str]
    """Names of the metrics that differ."""


class ResumeCheck(BaseModel):
    """Result of the repetition of a run's last steps."""

    start: str | None
    """Name of the checkpoint from which the steps were repeated; None for the start of the run."""
    end: str
    """Name of the checkpoint after the last repeated step."""
    steps: list[RepeatedStep]
    different_state: list[str]
    """Tensors of `end`, as weights/NAME or optim/NAME, and fields of its manifest that the repetition has otherwise."""
    tolerance: float
    """Largest relative difference that counts as equal: 0 on CPUs, where bits are compared."""

    @property
    def different_steps(self) -> list[RepeatedStep]:
        return [step for step in self.steps if step.different]

    @property
    def is_equal(self) -> bool:
        return not self.different_steps and not self.different_state

    def error(self, run_id: str) -> MhmoeError | None:
        """Return the error that says what differs; None if nothing does."""
        names = dict.fromkeys(name for step in self.different_steps for name in step.different)
        reasons = []
        if names:
            labels = ", ".join(COMPARED_METRICS[name] for name in names)
            reasons.append(f"{len(self.different_steps)} of {len(self.steps)} repeated steps differ in {labels}")
        if self.different_state:
            rest_text = f" and {len(self.different_state) - 1} more" if len(self.different_state) > 1 else ""
            reasons.append(f"{self.end} differs in {self.different_state[0]}{rest_text}")
        start = self.start or "its start"
        error_type: type[MhmoeError] = CheckpointError
        if metrics.STREAM in names:
            error_type, fix = DataError, "restore the spec and the data with which it was trained"
        elif names:
            fix = f"restore {start}, or check where it was trained: other CPUs differ too"
        else:
            fix = f"remove {self.end}, and `mhmoe resume` goes on from {start}"
        return error_type(f"run {run_id}", ", and ".join(reasons), fix) if reasons else None


class Repetition(NamedTuple):
    """The steps of a run to repeat."""

    run: RunDir
    start: Location | None
    """Checkpoint from which they are repeated; None for the start of a run with random weights."""
    end: Location
    """Newest checkpoint of the run, which the repetition has to equal."""

    @property
    def first_step(self) -> int:
        return 1 + (step_and_group(self.start)[0] if self.start else 0)

    @property
    def last_step(self) -> int:
        return step_and_group(self.end)[0]

    def spec(self, folder: Location) -> RunSpec:
        """Return the run's spec with `folder` as storage, without trackers, and with the workers that trained `end`."""
        spec, manifest = self.run.spec(), stored_manifest(self.end)
        cluster = spec.cluster.model_copy(update={"ep": manifest.ep})
        # Checkpoints on the way to the last one are not needed, and may be many.
        train = spec.train.model_copy(update={"keep_checkpoints": 1})
        changes = {"storage": folder, "cluster": cluster, "train": train, "tracking": TrackingSpec()}
        return spec.model_copy(update=changes).with_workers(manifest.world)


def find_repetition(run: RunDir) -> Repetition:
    """Return the steps of a run that can be repeated; a run without such steps is a RunError or CheckpointError."""
    checkpoints, run_events = committed_checkpoints(run)[::-1], events.read(run)
    if not checkpoints:
        raise no_checkpoint_error(run)
    end, last_step = checkpoints[0], step_and_group(checkpoints[0])[0]
    # The run did not go on from checkpoints that it skipped as damaged.
    skipped_names = {e["name"].rpartition("/")[2] for e in run_events if e["event"] == "skipped_checkpoint"}
    earlier = [c for c in checkpoints if step_and_group(c)[0] < last_step and c.name not in skipped_names]
    repetition = Repetition(run, earlier[0] if earlier else None, end)
    fix = "train it to its next checkpoint, and keep at least two (train.keep_checkpoints)"
    if last_step == 0 or (repetition.start is None and run.spec().start):
        raise RunError(f"run {run.id}", f"there is no checkpoint before {end.name} to repeat steps from", fix)
    lines = history.read(run)
    groups = {n[metrics.GROUP] for n in lines if repetition.first_step <= n[metrics.STEP] <= repetition.last_step}
    starts = [e for e in run_events if e["event"] == "started" and e["group"] in groups]
    if len({(len(e["workers"]), e.get("ep")) for e in starts}) > 1:
        reason = f"steps {repetition.first_step:,} to {last_step:,} were not all trained by equally many workers"
        raise RunError(f"run {run.id}", reason, fix)
    return repetition


class CheckRequest(RemoteJob[ResumeCheck]):
    """Request for the job that repeats the last recorded steps of a run, and compares them."""

    module: ClassVar[str] = "mhmoe_ray.train.repetition"
    kind: ClassVar[str] = "check"
    result_type: ClassVar[Any] = ResumeCheck

    path: str
    """Run directory."""
    token: str
    """Random text, which makes the names of the job and its folder unique."""

    @property
    def run(self) -> RunDir:
        return RunDir(location(self.path))

    @property
    def job_name(self) -> str:
        return f"{self.kind}-{self.run.id}-{self.token}"

    @property
    def folder(self) -> Location:
        """Temporary folder of the repetition. It is no run of the storage, so no command takes it for the newest."""
        return self.run.path.parent / f".{self.kind}-{self.token}"

    def execute(self) -> None:
        """Repeat the steps in `folder`, remove it, and answer."""
        try:
            self.answer(_check(find_repetition(self.run), self.folder))
        finally:
            remove_tree(self.folder, ignore_errors=True)


def _check(repetition: Repetition, folder: Location) -> ResumeCheck:
    """Train the steps again and compare. Damage that is found before is a CheckpointError or DataError."""
    # These imports are delayed, because they import Ray's libraries, which the command that sends the request lacks.
    from mhmoe_ray.data.shards.manifest import require_data_manifest, require_matching_data
    from mhmoe_ray.train.driver import train_run
    from mhmoe_ray.train.stream_start import describe_on_all_nodes

    run, start, end = repetition.run, repetition.start, repetition.end
    # Both are named in errors, while training would name a copy.
    manifest = read_manifest(end, describe=describe_on_all_nodes)
    start_manifest = read_manifest(start, describe=describe_on_all_nodes) if start else None
    spec = repetition.spec(folder)
    require_data_manifest(spec.data.prepared)
    require_matching_data(manifest.data_sha256, spec.data.prepared, "which has to be complete")
    repeated_run = create_run(spec)
    for file in (run.tokenizer_file, run.classes_file, run.chat_template_file, run.start_file, run.reference_file):
        if file.exists():
            copy_file(file, repeated_run.path / file.name)
    if start and start_manifest:
        # Worker groups of the repetition count from 1, so their checkpoints are newer than that of group 0.
        copied_checkpoints = {checkpoint_name(start_manifest.step, 0): start}
        if start_manifest.adapter:
            copied_checkpoints[start_manifest.adapter.base] = start.with_name(start_manifest.adapter.base)
        for copy_name, checkpoint in copied_checkpoints.items():
            for name in (*stored_manifest(checkpoint).files, MANIFEST):
                copy = repeated_run.checkpoints / copy_name / name
                with (checkpoint / name).open("rb") as source, create_file(copy) as target:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
    start_name = start.name if start else None
    first_step, last_step = repetition.first_step, repetition.last_step
    CheckRequest.print_line(f"repeating steps {first_step:,} to {last_step:,} from {start_name or 'the start'}")
    try:
        train_run(repeated_run, AttemptId(1), last_step)
    except JobError as e:
        reason = f"the repetition from {start_name or 'its start'} failed ({e.subject}: {e.reason})"
        raise JobError(f"run {run.id}", reason, "the run passed this step: see the job in the dashboard") from e
    CheckRequest.print_line("comparing the repetition")
    repeated = newest_checkpoint(repeated_run)
    assert repeated is not None
    assert repeated.manifest.step == last_step
    tolerance = GPU_TOLERANCE if spec.cluster.gpus_per_worker else 0.0
    return ResumeCheck(
        start=start_name,
        end=end.name,
        steps=list(_compared_steps(repetition, repeated_run, tolerance)),
        different_state=[
            *_different_fields(manifest, repeated.manifest, tolerance),
            *_different_tensors(end, manifest, repeated.checkpoint, repeated.manifest, tolerance),
        ],
        tolerance=tolerance,
    )


def _compared_steps(repetition: Repetition, repeated_run: RunDir, tolerance: float) -> Iterator[RepeatedStep]:
    recorded_lines, repeated_lines = (
        {line[metrics.STEP]: {name: line[name] for name in COMPARED_METRICS if name in line} for line in lines}
        for lines in (history.read(repetition.run), history.read(repeated_run))
    )
    for step in range(repetition.first_step, repetition.last_step + 1):
        recorded, repeated = recorded_lines.get(step, {}), repeated_lines.get(step, {})
        # Lines of older versions of this project lack some of the metrics.
        names = recorded or COMPARED_METRICS
        different = [n for n in names if not is_close(recorded.get(n), repeated.get(n), tolerance)]
        yield RepeatedStep(step=step, recorded=recorded, repeated=repeated, different=different)


def is_close(recorded: float | str | None, repeated: float | str | None, tolerance: float) -> bool:
    """Return whether two values of a metric are equal or, if both are numbers, differ by at most the tolerance."""
    if isinstance(recorded, float) and isinstance(repeated, float):
        return math.isclose(recorded, repeated, rel_tol=tolerance)
    return recorded == repeated


def _different_fields(
    manifest: CheckpointManifest, repeated_manifest: CheckpointManifest, tolerance: float
) -> Iterator[str]:
    """Yield the fields of manifests that differ. With a tolerance, `recent_updates` is left out: it repeats losses."""
    left_out = {"files", "recent_updates"} if tolerance else {"files"}
    for name in CheckpointManifest.model_fields:
        if name not in left_out and getattr(manifest, name) != getattr(repeated_manifest, name):
            yield f"{MANIFEST}: {name}"


def _different_tensors(
    checkpoint: Location,
    manifest: CheckpointManifest,
    repeated_checkpoint: Location,
    repeated_manifest: CheckpointManifest,
    tolerance: float,
) -> Iterator[str]:
    """Yield the tensors that differ, or that only one of two verified checkpoints has."""
    # Files of equal hashes need not be read again.
    if manifest.files == repeated_manifest.files:
        return
    from mhmoe_ray.checkpoint.format import full_shape
    from mhmoe_ray.checkpoint.load import read_index, read_tensors

    for part in PARTS:
        indexes = {folder / part: read_index(folder / part) for folder in (checkpoint, repeated_checkpoint)}
        for name in sorted({name for index in indexes.values() for name in index}):
            tensors = [
                read_tensors(folder, {name: full_shape(index[name])}, index)[name] if name in index else None
                for folder, index in indexes.items()
            ]
            if not _are_close(tensors, tolerance):
                yield f"{part}/{name}"


def _are_close(tensors: "Sequence[Tensor | None]", tolerance: float) -> bool:
    """Return whether two tensors have equal bits or, with a tolerance, the norm of their difference is within it."""
    import torch

    tensor, repeated = tensors
    if tensor is None or repeated is None or (tensor.shape, tensor.dtype) != (repeated.shape, repeated.dtype):
        return False
    if not tolerance:
        # Values would not do: NaN is not equal to itself, and 0 is equal to -0.
        return torch.equal(tensor.view(-1).view(torch.uint8), repeated.view(-1).view(torch.uint8))
    difference = (tensor.double() - repeated.double()).norm()
    return bool(difference <= tolerance * tensor.double().norm())


if __name__ == "__main__":
    CheckRequest.main()
