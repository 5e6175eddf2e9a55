"""Driver of a run's job: prepare the data that is missing, and train with Ray Train's workers."""

import os
from typing import Any

import ray
import ray.data
import ray.train

from mhmoe_ray.checkpoint.manifest import last_step, newest_checkpoint
from mhmoe_ray.data.order.mixture import training_order
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.shards.files import verify_shards
from mhmoe_ray.data.shards.manifest import require_data_of
from mhmoe_ray.errors import DataError, JobError, MhmoeError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import ObjectPath, copy_file, describe_file
from mhmoe_ray.train.malloc import settings
from mhmoe_ray.train.resilience import RunTrainer
from mhmoe_ray.train.stream_start import StreamFromNewest, describe_together
from mhmoe_ray.train.watchdog import Watchdog
from mhmoe_ray.train.worker_failures import RecordLost, causes, first_cause, reason


def drive(run: RunDir, attempt: int) -> None:
    """Train a run to its end, from its newest checkpoint if there is one.

    Args:
        run: the run.
        attempt: number of the attempt (a submit or a resume) that this job executes.

    Raises:
        MhmoeError: the data, a checkpoint or the training failed; the message holds the reason of a failed worker.
    """
    spec = run.spec()
    _prepare(run, spec)
    if newest := newest_checkpoint(run, parts=()):
        require_data_of(newest.manifest.data_sha256, spec.data.prepared, "or submit a new run")
    if newest and newest.manifest.step >= spec.train.steps:
        whole = newest_checkpoint(run, describe=describe_together)
        if whole and whole.manifest.step >= spec.train.steps:
            events.record(run, "finished", step=whole.manifest.step)
            return
    workers = spec.cluster.workers
    watchdog = Watchdog.start(run, spec.cluster.hang_seconds)
    trainer = RunTrainer(
        run,
        spec,
        train_loop_config={"run": str(run.path), "attempt": attempt, "watchdog": watchdog},
        datasets={"train": ray.data.range(1)},  # a name: what it stands for, dataset_config makes for each worker group
        dataset_config=StreamFromNewest(run, spec, attempt, watchdog),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min, workers.max) if workers.elastic else workers.max,
            elastic_resize_monitor_interval_s=0.0,  # considered after each checkpoint instead
            use_gpu=spec.cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(spec),
        ),
        run_config=ray.train.RunConfig(
            # A name that was never used: a reused one silently resumes Ray's own snapshot of the other run.
            name=f"{run.id}-{attempt}",
            **_ray_storage(run),
            callbacks=[RecordLost(run)],
            failure_config=ray.train.FailureConfig(
                max_failures=spec.cluster.max_failures,
                max_preemption_failures=-1,  # without end
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={} if spec.cluster.gpus_per_worker else {"env_vars": settings(os.environ)},
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as e:
        raise _explain(run, e) from e
    step = last_step(run)  # workers end with a checkpoint
    events.record(run, "finished" if step == spec.train.steps else "stopped", step=step)


def _prepare(run: RunDir, spec: RunSpec) -> None:
    folder = spec.data.prepared
    if not folder.exists():
        events.record(run, "preparing", folder=str(folder))
    manifest = prepare(spec)
    verify_shards(folder, manifest)
    training_order(spec, manifest)  # its errors are users' mistakes, said here and not by a task of the stream
    if not run.tokenizer_file.exists():
        copy_file(folder / "tokenizer.json", run.tokenizer_file)
    elif describe_file(run.tokenizer_file).sha256 != manifest.tokenizer_sha256:
        fix = "restore the prepared folder, or submit a new run"
        raise DataError(f"prepared data {folder}", "its tokenizer is not the one this run began with", fix)
    figures = manifest.baselines.model_dump()
    events.record(run, "prepared", validation_tokens=manifest.validation_tokens, **figures)


def _ray_storage(run: RunDir) -> dict[str, Any]:
    """Return the arguments of `ray.train.RunConfig` that say where Ray Train keeps its own files."""
    if isinstance(run.ray, ObjectPath):
        system, path = run.ray.filesystem
        return {"storage_filesystem": system, "storage_path": path}
    return {"storage_path": str(run.ray)}


def _resources(spec: RunSpec) -> dict[str, float]:
    resources = {"CPU": float(spec.cluster.cpus_per_worker)}
    return resources | ({"GPU": float(spec.cluster.gpus_per_worker)} if spec.cluster.gpus_per_worker else {})


def _explain(run: RunDir, error: Exception) -> MhmoeError:
    """Return the first cause inside an error of Ray Train.

    An error of this package is returned as it is; any other one becomes a `JobError` with its reason in one line.
    """
    if isinstance(error, ray.train.WorkerGroupError):
        found = causes(error.worker_failures)
        rank = first_cause(found)
        cause = found[rank]
        return cause if isinstance(cause, MhmoeError) else JobError(f"worker {rank}", reason(cause), "see its log")
    return JobError(f"run {run.id}", reason(getattr(error, "controller_failure", error)), "see its log")
