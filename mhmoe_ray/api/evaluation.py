"""Evaluation of a run's checkpoint as a job on a cluster, unless the run directory holds the evaluation already."""

from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path

from mhmoe_ray.api.connection import connect_to_cluster
from mhmoe_ray.api.defaults import EVALUATION_SAMPLES, OnNote, Prior, ignore_note
from mhmoe_ray.cluster import remote
from mhmoe_ray.cluster.remote import SubmittedJob
from mhmoe_ray.errors import DataError, RunError, SpecError
from mhmoe_ray.evaluate.job import EvalJob
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, load_evaluation
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ClusterSpec, DataSpec, ModelSpec
from mhmoe_ray.spec.raw_text import raw_text_sections

EvaluationJob = SubmittedJob[Evaluation]
Texts = str | PathLike[str] | Sequence[str | PathLike[str]]
"""Paths, names or patterns, or one of them."""


def has_domain_experts(model: ModelSpec) -> bool:
    """Return whether a model has experts of domains, which is what a `Prior` is for."""
    return model.moe is not None and model.moe.router == "domain"


def make_request(
    run: RunDir,
    checkpoint: str,
    *,
    text: Texts = (),
    overrides: Sequence[str] = (),
    samples: int | None = None,
    tasks: str | Sequence[str] = (),
    task_folders: Texts = (),
    limit: int | None = None,
    gpus: int | None = None,
    prior: Prior | None = None,
    probe: str | PathLike[str] | None = None,
) -> EvalRequest:
    """Return a request to evaluate a run's checkpoint on raw text and in tasks, or on held-out samples without either.

    The run's spec gives the batch size, the precision and the resources.

    Args:
        run: the run.
        checkpoint: name of the checkpoint.
        text: folders, files or patterns of raw text, or one of them; empty for none.
        overrides: overrides of data keys, by which the text is read.
        samples: largest number of samples of each domain of the text, of pictures the largest number of different
            images; None for the default.
        tasks: names of lm-eval's tasks, or one of them; empty for none.
        task_folders: folders of the user's own tasks.
        limit: largest number of questions of each task; None for all.
        gpus: number of GPUs; None for as many as a worker of the training had.
        prior: prior probabilities of the domains of the text, for router `domain`; None if the domains are known.

        probe: pictures on which a linear probe is trained that classifies those of `text`; None for none.

    Raises:
        SpecError: an override is wrong.
        DataError: there is no such text.
    """
    text_data = raw_text_sections(_text_list(text), overrides)[0] if text else None
    probe_data = _probe_data(text_data, fspath(probe)) if text_data and probe is not None else None
    # An imported run has neither a spec nor held-out samples, so defaults replace the spec.
    spec = None if run.is_imported else run.spec()
    cluster = spec.cluster if spec else ClusterSpec()
    held_out = spec is not None and not text and not tasks
    return EvalRequest(
        run=str(run.path),
        checkpoint=checkpoint,
        prepared=str(spec.data.prepared) if spec and held_out else None,
        text=text_data,
        text_version=_text_version(text_data) if text_data else None,
        samples=(samples or EVALUATION_SAMPLES) if text else 0,
        tasks=_text_list(tasks),
        task_folders=[str(Path(folder).absolute()) for folder in _text_list(task_folders)],
        limit=limit,
        batch=spec.train.micro_batch_size if spec else 1,
        half=spec is not None and spec.train.precision == "bfloat16",
        cpus=cluster.cpus_per_worker,
        gpus=cluster.gpus_per_worker if gpus is None else gpus,
        prior=prior,
        probe=probe_data,
        probe_version=_text_version(probe_data) if probe_data else None,
    )


def _probe_data(text: DataSpec, path: str) -> DataSpec:
    """Return the data section by which the pictures of a probe are read: like those that it classifies."""
    sources = list(text.sources.values())
    if len(sources) > 1:
        raise SpecError("the linear probe", f"it classifies one source, and there are {len(sources)}", "name one text")
    source = sources[0].model_copy(update={"path": str(Path(path).absolute()) if "://" not in path else path})
    return text.model_copy(update={"sources": {"probe": source}})


def _text_list(texts: Texts) -> list[str]:
    """Return paths or names as a list of texts; a single one is a list of one."""
    return [fspath(text) for text in ([texts] if isinstance(texts, str | PathLike) else texts)]


def _text_version(data: DataSpec) -> str:
    """Return a hash that changes with the files of raw text.

    Raises:
        DataError: there is no such text, or it cannot be read.
    """
    # The module imports pyarrow, which evaluations without raw text do not need here.
    from mhmoe_ray.data.sources import find_files, version_hash

    try:
        return version_hash(data, find_files(data))
    except OSError as e:
        raise DataError(f"text {', '.join(data.sources)}", e.strerror or str(e), "correct its path") from e


def load_or_evaluate(
    run: RunDir,
    request: EvalRequest,
    recompute: bool = False,
    address: str | None = None,
    *,
    follow: Callable[[EvaluationJob], None] | None = None,
    on_note: OnNote = ignore_note,
) -> Evaluation:
    """Return the evaluation of a request: the one that the run directory holds, else a new one by a job on the cluster.

    Args:
        run: the run.
        request: what to evaluate.
        recompute: whether to compute it even if the run directory holds it.
        address: address of the cluster; None for the default.
        follow: function that returns when the job ends; by default `on_note` gets the lines that the job writes for the
            user.
        on_note: function that is called with a line about what is done.

    Raises:
        RunError: the request names no text and no tasks, and the run has no held-out samples.
        DataError: the prepared data is missing.
        MhmoeError: the job failed; this is the error that it logged.
    """
    if not request.description:
        raise RunError(f"run {run.id}", "it was imported and has no held-out text", "name some text or tasks")
    # The same request gives the same result, so a stored evaluation is used if there is one.
    if not recompute and (stored_evaluation := load_evaluation(run, request)):
        on_note(f"it was evaluated before, in {run.evaluations}; `mhmoe eval --again` or recompute=True repeats it")
        return stored_evaluation
    # This call raises an error if the prepared data is missing, before a cluster is started to read the data.
    if request.prepared:
        # The module imports pyarrow, which a stored evaluation does not need.
        from mhmoe_ray.data.shards.manifest import require_data_manifest

        require_data_manifest(Path(request.prepared))
    section = ClusterSpec() if run.is_imported else run.spec().cluster
    connection = connect_to_cluster(section, [run.path, *_local_paths(request)], request.cpus, address, on_note)
    job = remote.submit(connection, section.runtime_env, EvalJob(request=request, can_grow=not connection.local))
    if follow is not None:
        follow(job)
    else:
        for line in job.progress():
            on_note(line)
    return job.result(f"evaluation of {run.id}")


def _local_paths(request: EvalRequest) -> list[Path]:
    """Return the file paths of the data and tasks that a request reads; URLs of object stores are left out."""
    paths = [request.prepared] if request.prepared else []
    paths += [source.path for source in request.text.sources.values()] if request.text else []
    # URLs of an object store need no check, because all nodes can reach it.
    return [Path(path) for path in (*paths, *request.task_folders) if "://" not in path]
