"""`mhmoe generate --input`: let a checkpoint answer all rows of a file, as a job on a cluster."""

import shlex
import time
from pathlib import Path
from typing import Any

import typer

from mhmoe_ray.api import connection as checks
from mhmoe_ray.api.serve_target import resolve_target
from mhmoe_ray.checkpoint.manifest import MANIFEST, is_committed, stored_manifest
from mhmoe_ray.cli.generate import BatchOptions
from mhmoe_ray.cli.output import follow_job, note, out, print_json, print_note, show_activity
from mhmoe_ray.cluster import remote
from mhmoe_ray.cluster.connect import connect_if_running
from mhmoe_ray.cluster.jobs import find_alive, is_alive, stop
from mhmoe_ray.errors import DataError, ServeError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.batch.input import check_rows, open_input
from mhmoe_ray.serving.batch.job import OUTPUT_KEY, BatchJob
from mhmoe_ray.serving.batch.output import BatchOutput
from mhmoe_ray.serving.batch.request import CHUNK_ROWS, BatchRequest, InputFile
from mhmoe_ray.serving.batch.rows import AnswerCounts
from mhmoe_ray.serving.load import check_generates
from mhmoe_ray.serving.sampling import SamplingParams
from mhmoe_ray.spec import DeploySpec
from mhmoe_ray.storage import Location, describe_file, location

POLL_SECONDS = 0.5
"""Seconds between two requests that ask the cluster whether a job has ended."""


def answer_file(
    run: str | None,
    checkpoint: str | None,
    storage: str,
    sampling: SamplingParams,
    options: BatchOptions,
    json: bool,
) -> None:
    """Let a job on a cluster answer all rows of a file that have no answer yet, and follow the job.

    Input that cannot be read, or an output folder of another request, is a DataError.
    """
    if options.output is None:
        raise typer.BadParameter("--input needs a folder for the answers: name one with --output")
    output = BatchOutput(location(options.output).absolute())
    if options.cancel:
        _cancel(output, options.address)
        return
    if options.input is None:
        raise typer.BadParameter("--output needs a file of prompts: name one with --input")
    run_dir, checkpoint_path, spec = resolve_target(
        run, checkpoint, storage, options.overrides, print_note, options.trust_run
    )
    # If the user named no checkpoint, neither by the option nor by its folder in place of the run, use the one that
    # gave the answers in the output folder.
    if checkpoint is None and (run is None or location(run).absolute() != checkpoint_path):
        checkpoint_path = _checkpoint_of_answers(run_dir, output) or checkpoint_path
    input_path = options.input if "://" in options.input else str(Path(options.input).absolute())
    request = _make_request(run_dir, checkpoint_path, spec, sampling, input_path, output, options.chunk_rows)
    if (counts := output.stored_summary()) and not output.missing_chunks(request):
        note.print("all rows are answered already", soft_wrap=True)
        _print_counts(output, counts, json)
        return
    job = _start_or_find_job(run_dir, spec, request, output, options)
    hint = "give the command again to follow it"
    if options.detach:
        if json:
            print_json({"output": str(output.folder), "job": job.name})
        else:
            note.print(f"job {job.name} answers into {output.folder}; {hint}", soft_wrap=True)
        return
    cancel_command = f"mhmoe generate --output {shlex.quote(options.output)} --cancel"
    follow_job(job, f"{hint}; to end it: {cancel_command}")
    fix = "give the command again: it continues with the chunks that are missing"
    _print_counts(output, job.result(f"answers in {output.folder}", fix), json)


def _checkpoint_of_answers(run: RunDir, output: BatchOutput) -> Location | None:
    """Return the checkpoint of a run that gave the answers in an output folder, even if the run has a newer one by now.
    The result is None if there are no answers, or the checkpoint was removed or is another run's."""
    stored_request = output.stored_request()
    if stored_request is None or not output.present_chunks():
        return None
    checkpoint = location(stored_request.checkpoint)
    return checkpoint if checkpoint.parent == run.checkpoints and is_committed(checkpoint) else None


def _make_request(
    run: RunDir,
    checkpoint: Location,
    spec: DeploySpec,
    sampling: SamplingParams,
    input_path: str,
    output: BatchOutput,
    chunk_rows: int | None,
) -> BatchRequest:
    """Return the request for the answers to all rows of a file, after checking the rows and the output folder.

    If `chunk_rows`, the number of rows of each output file, is None, the request in the folder has it, else the
    default. A model that cannot generate text, or conversations without a chat template, are a ServeError.
    """
    check_generates(stored_manifest(checkpoint).model)
    source, stored_request = open_input(input_path), output.stored_request()
    try:
        input_file = InputFile(path=input_path, format=source.format, sha256=describe_file(location(input_path)).sha256)
    except OSError as e:
        raise DataError(source.subject, e.strerror or str(e), "correct --input") from e
    request = BatchRequest(
        checkpoint=str(checkpoint),
        manifest_sha256=describe_file(checkpoint / MANIFEST).sha256,
        input=input_file,
        sampling=sampling,
        engine=spec.serve.engine,
        precision=spec.serve.precision,
        chunk_rows=chunk_rows or (stored_request.chunk_rows if stored_request else CHUNK_ROWS),
    )
    output.check_request(request, is_first=True)
    is_checked = stored_request is not None and not stored_request.differences(request)
    # If the output folder holds an equal request (with the same hash of the input), these rows were checked for that
    # request. They are not checked again, because a check takes longer than the hash.
    checked_file = stored_request.input if stored_request and is_checked else _check_input(request)
    if checked_file.first_chat and not run.chat_template_file.exists():
        subject = f"{source.subject} row {checked_file.first_chat}"
        reason = f"it has messages, and run {run.id} has no chat template"
        raise ServeError(subject, reason, "give prompts, or another run")
    return request.model_copy(update={"input": checked_file.model_copy(update={"path": input_path})})


def _check_input(request: BatchRequest) -> InputFile:
    show_activity(f"checking the rows of {request.input.path}")
    rows = check_rows(open_input(request.input.path), request.sampling.logprobs is not None)
    return request.input.model_copy(update={"rows": rows.row_count, "first_chat": rows.first_chat})


def _start_or_find_job(
    run: RunDir, spec: DeploySpec, request: BatchRequest, output: BatchOutput, options: BatchOptions
) -> remote.SubmittedJob[AnswerCounts]:
    """Return the job that writes answers into the output folder: the one that runs already, else a new one. A running
    job of another request is a DataError."""
    # API keys are only for clients of a server, so the job does not get them.
    serve, workers = spec.serve.model_copy(update={"keys": ()}), options.workers or 1
    demand = checks.WorkerDemand(
        1,
        serve.cpus_per_replica,
        serve.gpus_per_replica,
        "give a lower --cpus-per-worker or --gpus-per-worker, or name a larger cluster with --address",
        "the job waits until nodes join",
    )
    cpus = workers * serve.cpus_per_replica
    checks.check_gpus_of_this_machine(demand, cpus, options.address)
    required_paths = [run.path, location(request.input.path), output.folder]
    connection = checks.connect_to_cluster(spec.cluster, required_paths, cpus, options.address, print_note)
    checks.check_capacity(demand, connection, print_note)
    job = BatchJob(request=request, output=str(output.folder), serve=serve, workers=workers)
    if name := find_alive(connection, OUTPUT_KEY, str(output.folder)):
        output.check_request(request, is_first=False)
        note.print(f"job {name} answers into this folder already", soft_wrap=True)
        return remote.SubmittedJob(connection, job, name)
    output.write_request(request)
    # From now on, a run that still trains keeps the checkpoint until all rows are answered.
    checkpoint_name = location(request.checkpoint).name
    events.record_use(run, "answering", print_note, output=str(output.folder), checkpoint=checkpoint_name)
    return remote.submit(connection, spec.cluster.runtime_env, job, print_note)


def _cancel(output: BatchOutput, address: str | None) -> None:
    connection = connect_if_running(address)
    name = find_alive(connection, OUTPUT_KEY, str(output.folder)) if connection else None
    if connection is None or name is None:
        out.print(f"no job answers into {output.folder}", soft_wrap=True)
        return
    stop(connection, name)
    while is_alive(connection, name):
        time.sleep(POLL_SECONDS)
    out.print(f"job {name} is ended; the command that started it continues it", soft_wrap=True)


def _print_counts(output: BatchOutput, counts: AnswerCounts, json: bool) -> None:
    if json:
        result: dict[str, Any] = {"output": str(output.folder), **counts.model_dump()}
        print_json(result)
    else:
        out.print(
            f"{counts.rows:,} rows with {counts.prompt_tokens:,} tokens are answered with {counts.tokens:,} tokens in "
            f"{output.folder}",
            soft_wrap=True,
        )
    if counts.errors:
        note.print(f"warning: rows without an answer: {counts.errors:,}; their column `error` says why", soft_wrap=True)
