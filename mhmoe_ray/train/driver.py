"""Driver of a training job: it prepares missing data, and then trains with the workers of Ray Train."""

import os
from typing import Any

import ray
import ray.data
import ray.train

from mhmoe_ray.checkpoint.manifest import last_step, newest_checkpoint
from mhmoe_ray.checkpoint.start.record import plan_start
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.shards.manifest import CLASSES_FILE, TEMPLATE_FILE, TOKENIZER_FILE, require_matching_data
from mhmoe_ray.data.shards.verify import verify_shards
from mhmoe_ray.errors import DataError, JobError, MhmoeError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import AttemptId, RunDir, require_newest_attempt
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import ObjectPath, copy_file, describe_file
from mhmoe_ray.train.malloc import malloc_settings
from mhmoe_ray.train.resilience import RunTrainer
from mhmoe_ray.train.stream_start import ResumingDataConfig, describe_on_all_nodes
from mhmoe_ray.train.telemetry.servers import open_servers
from mhmoe_ray.train.watchdog import Watchdog
from mhmoe_ray.train.worker_failures import WorkerFailureCallback, failure_reason, root_cause


def train_run(run: RunDir, attempt: AttemptId, end_step: int | None = None) -> None:
    """Prepare a run's data if it is missing, train from its newest checkpoint on, and record how it ended: with step
    `end_step`, by default the spec's last one, or, at a user's request, earlier. A failure is an MhmoeError; that of a
    worker has the worker's reason."""
    spec = run.spec()
    # What a tracker lacks is reported before the data is prepared.
    open_servers(run, spec)
    _prepare_data(run, spec, attempt)
    if spec.start is not None:
        # This import takes seconds, because it imports torch.
        from mhmoe_ray.checkpoint.start.write import write_start_checkpoint

        write_start_checkpoint(run, spec)
    if newest := newest_checkpoint(run, parts=()):
        require_matching_data(newest.manifest.data_sha256, spec.data.prepared, "or submit a new run")
    if newest and newest.manifest.step >= spec.train.steps:
        verified_checkpoint = newest_checkpoint(run, describe=describe_on_all_nodes)
        if verified_checkpoint and verified_checkpoint.manifest.step >= spec.train.steps:
            events.record(run, "finished", step=verified_checkpoint.manifest.step)
            return
    workers = spec.cluster.workers
    watchdog = Watchdog.start(run, spec.cluster.hang_seconds)
    trainer = RunTrainer(
        run,
        spec,
        train_loop_config={
            "run": str(run.path),
            "attempt": attempt,
            "watchdog": watchdog,
            "last_step": end_step or spec.train.steps,
        },
        # This dataset is never read. Only its name counts: for each worker group, `dataset_config` puts the training
        # stream in its place.
        datasets={"train": ray.data.range(1)},
        dataset_config=ResumingDataConfig(run, spec, attempt, watchdog),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min, workers.max) if workers.is_elastic else workers.max,
            # 0 lets Ray ask the scaling policy at every poll. The policy itself allows growth only after a new
            # checkpoint, and should notice that checkpoint at once.
            elastic_resize_monitor_interval_s=0.0,
            use_gpu=spec.cluster.gpus_per_worker > 0,
            resources_per_worker=_worker_resources(spec),
        ),
        run_config=ray.train.RunConfig(
            # The name must be new for each attempt. Otherwise Ray Train would silently resume its own snapshot of an
            # earlier attempt with the same name.
            name=f"{run.id}-{attempt.number}",
            **_ray_storage(run),
            callbacks=[WorkerFailureCallback(run, attempt)],
            failure_config=ray.train.FailureConfig(
                max_failures=spec.cluster.max_failures,
                # -1 means that preemptions have no limit: only failures count against `cluster.max_failures`.
                max_preemption_failures=-1,
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={} if spec.cluster.gpus_per_worker else {"env_vars": malloc_settings(os.environ)},
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as e:
        raise _training_error(run, e) from e
    # Workers save a checkpoint before they end, so the step of the newest checkpoint is the last step that they
    # trained.
    step = last_step(run)
    require_newest_attempt(run, attempt)
    events.record(run, "finished" if step == spec.train.steps else "stopped", step=step)


def _prepare_data(run: RunDir, spec: RunSpec, attempt: AttemptId) -> None:
    """Prepare the data if it is missing, verify it, and copy its tokenizer and other small files into the run
    directory. Damaged data, or data that does not fit the spec or has other such files than the run began with, is a
    DataError."""
    folder = spec.data.prepared
    if not folder.exists():
        events.record(run, "preparing", folder=str(folder))
    manifest = prepare(spec)
    verify_shards(folder, manifest, spec.cluster.shard_cache)
    require_newest_attempt(run, attempt)
    # `training_order` is called only for its checks, and its result is not used. A mistake in the mixture of sources
    # raises here with one clear message; otherwise it would raise later, in a task of the stream. The record of the
    # models that a run starts from is in start.json. A run without this file has not begun, so the record is planned
    # from the spec.
    record = read_start(run) or plan_start(spec)
    training_order(spec, manifest, record.samples_before if record else None)
    run_files = {
        TOKENIZER_FILE: ("tokenizer", run.tokenizer_file),
        CLASSES_FILE: ("classes", run.classes_file),
        TEMPLATE_FILE: ("chat template", run.chat_template_file),
    }
    for file_name, (name, run_file) in run_files.items():
        sha256 = manifest.files.get(file_name)
        if sha256 is None:
            continue
        if not run_file.exists():
            copy_file(folder / file_name, run_file)
        elif describe_file(run_file).sha256 != sha256:
            fix = "restore the prepared folder, or submit a new run"
            raise DataError(f"prepared data {folder}", f"its {name} is not the one this run began with", fix)
    baselines = manifest.baselines.model_dump() if manifest.baselines else {}
    events.record(run, "prepared", validation_tokens=manifest.validation_tokens, **baselines)


def _ray_storage(run: RunDir) -> dict[str, Any]:
    """Return the arguments of `ray.train.RunConfig` that set the folder for Ray Train's own files."""
    if isinstance(run.ray, ObjectPath):
        system, path = run.ray.filesystem
        return {"storage_filesystem": system, "storage_path": path}
    return {"storage_path": str(run.ray)}


def _worker_resources(spec: RunSpec) -> dict[str, float]:
    resources = {"CPU": float(spec.cluster.cpus_per_worker)}
    return resources | ({"GPU": float(spec.cluster.gpus_per_worker)} if spec.cluster.gpus_per_worker else {})


def _training_error(run: RunDir, error: Exception) -> MhmoeError:
    """Return the root cause of an error of Ray Train: an error of this package, or a `JobError` with a one-line
    reason."""
    if isinstance(error, ray.train.WorkerGroupError):
        rank, cause = root_cause(error.worker_failures)
        if isinstance(cause, MhmoeError):
            return cause
        return JobError(f"worker {rank}", failure_reason(cause), "see its log")
    return JobError(f"run {run.id}", failure_reason(getattr(error, "controller_failure", error)), "see its log")
