"""What `mhmoe eval` and `mhmoe routing` share: asking the cluster for an evaluation, unless the run has it already."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mhmoe_ray.cli import connecting
from mhmoe_ray.cli.common import note, pick_checkpoint
from mhmoe_ray.cli.job import Job

if TYPE_CHECKING:
    from mhmoe_ray.evaluate.request import EvalRequest, Evaluation
    from mhmoe_ray.runs.directory import RunDir


SAMPLES = 512
"""Of each domain of raw text, at most."""


def make_request(
    run: "RunDir",
    checkpoint: str | None,
    text: list[str],
    overrides: list[str],
    samples: int | None,
    tasks: list[str],
    task_folders: list[Path],
    limit: int | None,
    gpus: int | None,
) -> "EvalRequest":
    """Of raw text where some is named, else of the held-out samples, unless there are only tasks."""
    from mhmoe_ray.cli.survey import raw_text
    from mhmoe_ray.evaluate.request import EvalRequest
    from mhmoe_ray.spec import ClusterSpec

    if not text and (overrides or samples):
        raise typer.BadParameter("--set and --samples are about --text: name some")
    if not tasks and (limit or task_folders):
        raise typer.BadParameter("--limit and --task-folder are about --tasks: name some")
    path, _ = pick_checkpoint(run, checkpoint, hashed=False)
    spec = None if run.is_imported else run.spec()
    cluster = spec.cluster if spec else ClusterSpec()
    held_out = spec is not None and not text and not tasks
    return EvalRequest(
        run=str(run.path),
        checkpoint=path.name,
        prepared=str(spec.data.prepared) if spec and held_out else None,
        text=raw_text(text, overrides).data if text else None,
        samples=(samples or SAMPLES) if text else 0,
        tasks=tasks,
        task_folders=[str(folder.absolute()) for folder in task_folders],
        limit=limit,
        batch=spec.train.micro_batch_size if spec else 1,
        half=spec is not None and spec.train.precision == "bfloat16",
        cpus=cluster.cpus_per_worker,
        gpus=cluster.gpus_per_worker if gpus is None else gpus,
    )


def evaluation_of(run: "RunDir", request: "EvalRequest", again: bool, address: str | None) -> "Evaluation":
    """The answer that the run directory has, or one made on the cluster now.

    Args:
        run: the run.
        request: what to evaluate.
        again: also if it has an answer.
        address: of the cluster.

    Raises:
        RunError: there is nothing to evaluate.
        DataError, CheckpointError, SpecError, JobError: as the job's own.
    """
    from mhmoe_ray.data.shards.manifest import require_data_manifest
    from mhmoe_ray.errors import RunError
    from mhmoe_ray.evaluate import CAN_GROW, SAYS
    from mhmoe_ray.evaluate.request import stored
    from mhmoe_ray.spec import ClusterSpec
    from mhmoe_ray.spec.load import packed

    if not request.said:
        raise RunError(f"run {run.id}", "it was imported and has no held-out text", "give --text or --tasks")
    if not again and (found := stored(run, request)):
        note.print(f"as evaluated before, in {run.evaluations}; --again does it anew", soft_wrap=True)
        return found
    if request.prepared:
        require_data_manifest(Path(request.prepared))
    section: ClusterSpec = ClusterSpec() if run.is_imported else run.spec().cluster
    needed = [run.path, *_local(request)]
    connection = connecting.cluster_for(section, needed, request.cpus, address)
    env = {"MHMOE_REQUEST": packed(request.model_dump_json()), CAN_GROW: str(int(not connection.local))}
    job = Job.start(connection, section, "mhmoe_ray.evaluate.job", f"eval-{run.id}", env)
    job.say(SAYS)
    made = stored(run, request)
    if made is None or not job.has_succeeded:
        raise job.error(f"evaluation of {run.id}")
    return made


def _local(request: "EvalRequest") -> list[Path]:
    """Files of this machine that it reads."""
    named = [request.prepared] if request.prepared else []
    named += [source.path for source in request.text.sources.values()] if request.text else []
    return [Path(path) for path in (*named, *request.task_folders) if "://" not in path]
