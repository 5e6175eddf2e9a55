"""The documents of a run's step, and the steps of a document (data/documents.py)."""

from mhmoe_ray.api.defaults import OnNote
from mhmoe_ray.checkpoint.manifest import committed_checkpoints, stored_manifest
from mhmoe_ray.data.documents import DocumentRead, RunReading, StepDocument, documents_of_step, steps_of_document
from mhmoe_ray.data.shards.manifest import require_matching_data
from mhmoe_ray.errors import RunError
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.start import read_start
from mhmoe_ray.storage import location


def documents_at(run: RunDir, step: int, rank: int | None) -> list[StepDocument]:
    """Return the documents that a step of a run read, as `Run.documents_at`."""
    return documents_of_step(read_by_run(run), step, rank)


def find_document(run: RunDir, file: str, line: int | None, on_note: OnNote) -> list[DocumentRead]:
    """Return at which steps a document was read by a run and those that it started from, as `Run.find_document`."""
    return steps_of_document([read_by_run(run), *_read_by_ancestors(run, on_note)], file, line)


def read_by_run(run: RunDir, last_step: int | None = None) -> RunReading:
    """Return what a run has read up to a step, by default its last one; a DataError says that its data is another."""
    if run.is_imported:
        raise RunError(f"run {run.id}", "it was imported, so it has read nothing here", "name another run")
    spec, record = run.spec(), read_start(run)
    if checkpoints := committed_checkpoints(run):
        digest = stored_manifest(checkpoints[-1]).data_sha256
        require_matching_data(digest, spec.data.prepared, "or name another run")
    line = history.last_line(run) or {metrics.STEP: 0, metrics.GROUP: 0}
    # A group without a line has done no step yet. The steps of the groups before it count until it repeats them.
    start_events = [e for e in events.read(run) if e["event"] == "started" and e["group"] <= line[metrics.GROUP]]
    groups = [(e["step"], len(e["workers"])) for e in sorted(start_events, key=lambda event: event["group"])]
    steps = line[metrics.STEP] if last_step is None else last_step
    return RunReading(run.id, spec, record.samples_before if record else None, steps, groups)


def _read_by_ancestors(run: RunDir, on_note: OnNote) -> list[RunReading]:
    """Return what the runs have read that a run started from, and those that these started from, up to the start."""
    record, readings = read_start(run), list[RunReading]()
    for ancestor in record.ancestors if record else ():
        earlier_run = RunDir.of_checkpoint(location(ancestor.path))
        if ancestor.tokens and not earlier_run.attempts_file.exists():
            on_note(f"warning: run {ancestor.name} is gone, so its part of the training is left out")
        elif ancestor.tokens and not earlier_run.is_imported:
            readings += [read_by_run(earlier_run, ancestor.step), *_read_by_ancestors(earlier_run, on_note)]
    return readings
