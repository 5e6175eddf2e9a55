"""Evaluation of a run's checkpoint as a job on a cluster, unless the run directory holds the evaluation already."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from mhmoe_ray.api.checkpoints import CheckpointName, pick_checkpoint
from mhmoe_ray.api.connection import connect_to_cluster
from mhmoe_ray.api.defaults import EVALUATION_SAMPLES, OnNote, Prior, ignore_note
from mhmoe_ray.api.trust import ignored_keys
from mhmoe_ray.cluster import remote
from mhmoe_ray.cluster.remote import SubmittedJob
from mhmoe_ray.cluster.submissions import ENVIRONMENT_KEY
from mhmoe_ray.errors import DataError, RunError, SpecError
from mhmoe_ray.evaluate.job import EvalJob
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, load_evaluation
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ClusterSpec, DataSpec, ModelSpec
from mhmoe_ray.spec.raw_text import raw_text_sections
from mhmoe_ray.storage import location

EvaluationJob = SubmittedJob[Evaluation]
Texts = str | PathLike[str] | Sequence[str | PathLike[str]]
"""Raw text (one or several paths, URLs or glob patterns), or one or several folders of tasks."""


class EvaluationOptionsError(SpecError):
    """Options of an evaluation do not go together, or one is not for the model."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation by `mhmoe eval` or `Run.evaluate`, which describes them; `mhmoe routing` takes some.

    A checkpoint is evaluated on raw text, in tasks, or both; with neither, on held-out samples.
    """

    text: Texts = ()
    overrides: Sequence[str] = ()
    """`key.path=value` strings for keys of the `data` section with which the text is read."""
    samples: int | None = None
    """Largest number of samples, or of different images, of each domain of the text; None for `EVALUATION_SAMPLES`."""
    tasks: str | Sequence[str] = ()
    task_folders: Texts = ()
    limit: int | None = None
    gpus: int | None = None
    prior: Prior | None = None
    probe: str | PathLike[str] | None = None

    def check(self, names: Mapping[str, str]) -> None:
        """Raise an EvaluationOptionsError if the options do not go together; `names` has the user's name of each."""
        if not self.text and (self.overrides or self.samples):
            reason = f"{names['overrides']} and {names['samples']} are about {names['text']}"
        elif not self.tasks and (self.limit or self.task_folders):
            reason = f"{names['limit']} and {names['task_folders']} are about {names['tasks']}"
        elif self.probe and not self.text:
            reason = f"{names['probe']} classifies the images of {names['text']}"
        else:
            return
        raise EvaluationOptionsError("evaluation", reason, "name some")

    def check_model(self, model: ModelSpec, names: Mapping[str, str]) -> None:
        """Raise an EvaluationOptionsError if an option is not for a model; `names` has the user's name of each."""
        if self.prior is not None and not (model.moe and model.moe.router == "domain"):
            reason = f"{names['prior']} is for a model with router domain, and this model has no experts of domains"
            raise EvaluationOptionsError("evaluation", reason, "leave it out")
        if self.probe and model.encoder is None:
            reason = f"{names['probe']} classifies images by an encoder, and this model is none"
            raise EvaluationOptionsError("evaluation", reason, "leave it out")

    def request(self, run: RunDir, checkpoint: str) -> EvalRequest:
        """Return the request to evaluate a run's checkpoint, with the batch size and resources of the run's spec.

        A wrong override, or a probe for a text of several sources, is a SpecError, and missing text a DataError.
        """
        text_data, probe_data = None, None
        if self.text:
            text_data, cluster_section = raw_text_sections(_text_list(self.text), self.overrides)
            if cluster_section != ClusterSpec():
                reason = "an evaluation has the CPUs and GPUs of one of the run's workers"
                raise SpecError(
                    "override of the section cluster", reason, "remove it; the number of GPUs can be given apart"
                )
            if self.probe is not None:
                probe_data = _probe_data(text_data, fspath(self.probe))
        # An imported run has neither a spec nor held-out samples, so defaults replace the spec.
        spec = None if run.is_imported else run.spec()
        cluster = spec.cluster if spec else ClusterSpec()
        held_out = spec is not None and not self.text and not self.tasks
        folders = [Path(folder).absolute() for folder in _text_list(self.task_folders)]
        return EvalRequest(
            run=str(run.path),
            checkpoint=checkpoint,
            prepared=str(spec.data.prepared) if spec and held_out else None,
            text=text_data,
            text_version=_text_version(text_data) if text_data else None,
            samples=(self.samples or EVALUATION_SAMPLES) if self.text else 0,
            tasks=_text_list(self.tasks),
            task_folders=[str(folder) for folder in folders],
            tasks_version=_tasks_version(folders) if folders else None,
            limit=self.limit,
            batch=spec.train.micro_batch_size if spec else 1,
            half=spec is not None and spec.train.precision == "bfloat16",
            cpus=cluster.cpus_per_worker,
            gpus=cluster.gpus_per_worker if self.gpus is None else self.gpus,
            prior=self.prior,
            probe=probe_data,
            probe_version=_text_version(probe_data) if probe_data else None,
        )


FIELD_NAMES = {field.name: field.name for field in fields(EvaluationOptions)}


def _probe_data(text: DataSpec, path: str) -> DataSpec:
    """Return the data section for a probe's images, read as those of `text`, which must have one source."""
    sources = list(text.sources.values())
    if len(sources) > 1:
        raise SpecError("the linear probe", f"it classifies one source, and there are {len(sources)}", "name one text")
    source = sources[0].model_copy(update={"path": str(Path(path).absolute()) if "://" not in path else path})
    return text.model_copy(update={"sources": {"probe": source}})


def _text_list(texts: Texts) -> list[str]:
    return [fspath(text) for text in ([texts] if isinstance(texts, str | PathLike) else texts)]


def _text_version(data: DataSpec) -> str:
    """Return a hash that changes whenever a file of the raw text changes. Text that cannot be read is a DataError."""
    # This import is delayed, because the module imports pyarrow, which only evaluations on raw text need here.
    from mhmoe_ray.data.sources import find_files, version_hash

    try:
        return version_hash(data, find_files(data))
    except OSError as e:
        raise DataError(f"text {', '.join(data.sources)}", e.strerror or str(e), "correct its path") from e


def _tasks_version(folders: Sequence[Path]) -> str:
    """Return a hash over all files in folders of tasks; a file that cannot be read is a DataError."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            try:
                digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
            except OSError as e:
                raise DataError(f"file {file}", e.strerror or str(e), "make it readable") from e
    return digest.hexdigest()


def evaluate(
    run: RunDir,
    checkpoint: CheckpointName | None,
    options: EvaluationOptions,
    recompute: bool = False,
    address: str | None = None,
    *,
    option_names: Mapping[str, str] = FIELD_NAMES,
    follow: Callable[[EvaluationJob], None] | None = None,
    trust_run: bool = False,
    on_note: OnNote = ignore_note,
) -> Evaluation:
    """Return the evaluation of a run's checkpoint, which its directory holds or a job computes.

    `option_names` has the user's name of each option for an `EvaluationOptionsError`. `follow` shows the progress of
    the job and returns when the job ends; without it, `on_note` gets the lines that the job writes for the user. The
    other arguments and errors are those of `Run.evaluate`.
    """
    options.check(option_names)
    # The weights need not be hashed here, because the evaluation job hashes them when it loads them.
    path, manifest = pick_checkpoint(run, checkpoint, verify_hashes=False, on_note=on_note)
    options.check_model(manifest.model, option_names)
    request = options.request(run, path.name)
    if not request.description:
        raise RunError(f"run {run.id}", "it was imported and has no held-out text", "name some text or tasks")
    # The same request gives the same result, so a stored evaluation is used if there is one.
    if not recompute and (stored_evaluation := load_evaluation(run, request)):
        on_note(f"it was evaluated before, in {run.evaluations}; `mhmoe eval --again` or recompute=True repeats it")
        return stored_evaluation
    # This call raises an error if the prepared data is missing, before a cluster is started to read the data.
    if request.prepared:
        # This import is delayed, because the module imports pyarrow, which is not needed to return a stored evaluation.
        from mhmoe_ray.data.shards.manifest import require_data_manifest

        require_data_manifest(location(request.prepared))
    section, environment = ClusterSpec(), dict[str, Any]()
    if not run.is_imported:
        spec = run.spec()
        section = spec.cluster
        if not ignored_keys(run, spec, on_note, trust_run, [ENVIRONMENT_KEY]):
            environment = section.runtime_env
    connection = connect_to_cluster(section, [run.path, *_local_paths(request)], request.cpus, address, on_note)
    job = remote.submit(connection, environment, EvalJob(request=request, can_grow=not connection.local), on_note)
    if follow is not None:
        follow(job)
    else:
        for line in job.progress():
            on_note(line)
    return job.result(f"evaluation of {run.id}")


def _local_paths(request: EvalRequest) -> list[Path]:
    paths = [request.prepared] if request.prepared else []
    paths += [source.path for source in request.text.sources.values()] if request.text else []
    # URLs of an object store need no check, because all nodes can reach it.
    return [Path(path) for path in (*paths, *request.task_folders) if "://" not in path]
