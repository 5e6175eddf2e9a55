"""The Ray job of `mhmoe generate --input`, which answers the rows of a file."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.checkpoint.tokenizer import load_run_tokenizer
from mhmoe_ray.errors import DataError
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import load_chat_template
from mhmoe_ray.serving.batch.output import BatchOutput
from mhmoe_ray.serving.batch.request import BatchRequest
from mhmoe_ray.serving.batch.rows import AnswerCounts
from mhmoe_ray.serving.load import check_engine
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import describe_file, explain_error, location

PROGRESS_SECONDS = 5.0
READERS = 8
"""Number of output files that are read at the same time, to count earlier answers."""
OUTPUT_KEY = "mhmoe_output"
"""Key under which the job's metadata have the path of the output folder."""


class BatchJob(RemoteJob[AnswerCounts]):
    """Request for the job that answers the rows of a file; its result is the summary in the output folder."""

    module: ClassVar[str] = "mhmoe_ray.serving.batch.job"
    kind: ClassVar[str] = "generate"

    request: BatchRequest
    output: str
    """Path or URI of the output folder."""
    serve: ServeSpec
    workers: int

    @property
    def job_name(self) -> str:
        return self.unique_name(location(self.output).name)

    @property
    def metadata(self) -> dict[str, str]:
        return {OUTPUT_KEY: self.output}

    @property
    def output_folder(self) -> BatchOutput:
        return BatchOutput(location(self.output))

    def result(self, log: Callable[[], str]) -> AnswerCounts | None:
        return self.output_folder.stored_summary()

    def execute(self) -> None:
        """Answer the rows that have no answer yet."""
        _check(self)
        _answer_missing_rows(self)


def _check(job: BatchJob) -> None:
    """Check the input, the checkpoint and the engine before workers start, which would fail much later."""
    request, output = job.request, job.output_folder
    output.check_request(request, is_first=False)
    try:
        input_hash = describe_file(location(request.input.path)).sha256
    except OSError as e:
        reason, fix = explain_error(e, "put it where all nodes see it")
        raise DataError(f"input {request.input.path}", f"the job cannot read it: {reason}", fix) from e
    if input_hash != request.input.sha256:
        raise DataError(f"input {request.input.path}", "it has changed", "give the command again")
    checkpoint = location(request.checkpoint)
    # The weights are not hashed here, because each worker hashes them when it loads them.
    manifest = read_manifest(checkpoint, ("weights",), describe=None)
    check_engine(manifest, job.serve)
    tokenizer = load_run_tokenizer(checkpoint, manifest)
    load_chat_template(RunDir.of_checkpoint(checkpoint), tokenizer)


def _answer_missing_rows(job: BatchJob) -> None:
    from mhmoe_ray.serving.batch.pipeline import answer_chunks

    request, output = job.request, job.output_folder
    missing_chunks = output.missing_chunks(request)
    present_chunks = sorted(set(range(request.chunk_count)).difference(missing_chunks))
    with ThreadPoolExecutor(READERS) as pool:
        counts = sum(pool.map(partial(output.count_chunk, request), present_chunks), AnswerCounts())
    if missing_chunks:
        report = ProgressReporter(request.input.rows, counts.rows)
        job.print_line(f"{report.line()} are answered; starting {job.workers} worker{'s' if job.workers > 1 else ''}")
        _print_lack_of_resources(job)
        for result in answer_chunks(request, missing_chunks, output, job.serve, job.workers):
            counts += result.counts
            if report.is_due(counts.rows):
                job.print_line(report.line())
    if counts.rows != request.input.rows:
        reason = f"it changed while it was read: {counts.rows} of {request.input.rows} rows are answered"
        raise DataError(f"input {request.input.path}", reason, "restore it, then give the command again")
    output.complete(counts)
    run = RunDir.of_checkpoint(location(request.checkpoint))
    events.record_use(run, "answered", job.print_line, output=job.output)


def _print_lack_of_resources(job: BatchJob) -> None:
    """Print which resources the first worker waits for, if they are not free now."""
    import ray

    free_resources = ray.available_resources()
    needs = (("CPU", job.serve.cpus_per_replica), ("GPU", job.serve.gpus_per_replica))
    for name, count in needs:
        if count > (free_count := free_resources.get(name, 0)):
            job.print_line(f"waiting for {name}s: a worker needs {count}, and {free_count:g} are free")


class ProgressReporter:
    """Reporter of a job's progress: answered rows and speed."""

    def __init__(self, total_rows: int, rows: int) -> None:
        """Begin a report after `rows` rows that earlier jobs have answered."""
        self._total_rows, self._rows = total_rows, rows
        self._line_time = 0.0
        self._start: tuple[float, int] | None = None
        """Time and number of answered rows at this job's first result.

        The speed is measured from this time on, because loading the model takes long.
        """

    def is_due(self, rows: int) -> bool:
        """Update the number of answered rows, and return whether to print a line."""
        self._rows, current_time = rows, time.monotonic()
        self._start = self._start or (current_time, rows)
        if rows == self._total_rows or current_time - self._line_time >= PROGRESS_SECONDS:
            self._line_time = current_time
            return True
        return False

    def line(self) -> str:
        """Return a line with the answered rows and, if the speed is known, rows per second."""
        line = f"{self._rows:,} of {self._total_rows:,} rows"
        if self._start is None or self._rows == self._start[1]:
            return line
        speed = (self._rows - self._start[1]) / max(time.monotonic() - self._start[0], 1e-3)
        return f"{line}, {speed:,.1f} rows/s"


if __name__ == "__main__":
    BatchJob.main()
