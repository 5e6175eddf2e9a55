"""The output folder of a batch inference.

    _request.json            the request, written before its first job starts
    chunk-00000000.jsonl     the rows of chunk 0 with their answers; .parquet if the input is in Parquet
    _summary.json            the numbers of answers and tokens, written when the files of all chunks exist

A chunk's file appears in one step, when it is complete, so the files show which rows are answered; in the order of
their names, they hold the rows of the input. Programs that read a folder of Parquet files ignore names that begin with
an underscore.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mhmoe_ray.data.sources.columns import PYARROW_ERRORS
from mhmoe_ray.errors import DataError, StorageError
from mhmoe_ray.serving.batch.formats import FORMATS
from mhmoe_ray.serving.batch.request import BatchRequest
from mhmoe_ray.serving.batch.rows import AnswerCounts
from mhmoe_ray.storage import Location, explain_error, remove_partial_files, replace_file, write_json

M = TypeVar("M", bound=BaseModel)
_CHUNK_NAME = re.compile(r"chunk-(\d{8,})\.\w+")


@dataclass(frozen=True)
class BatchOutput:
    """Output folder of a batch inference, which may not exist yet.

    All methods raise a StorageError if the folder cannot be read or written.
    """

    folder: Location

    @contextmanager
    def _report_storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            fix = "correct the path or repair its storage, then give the command again"
            raise StorageError(f"output {self.folder}", *explain_error(e, fix)) from e

    @property
    def request_file(self) -> Location:
        return self.folder / "_request.json"

    @property
    def summary_file(self) -> Location:
        return self.folder / "_summary.json"

    def chunk_file(self, request: BatchRequest, chunk: int) -> Location:
        """Return the path of the file with the answers to a chunk."""
        return self.folder / f"chunk-{chunk:08d}{FORMATS[request.input.format].suffix}"

    def stored_request(self) -> BatchRequest | None:
        """Return the folder's request, if any; a damaged request, or files without one, are a DataError."""
        if request := self._read_model(self.request_file, BatchRequest):
            return request
        with self._report_storage_errors():
            # A folder without files counts as unused. On an object store, such a folder does not even exist.
            is_used = self.folder.exists() and next(iter(self.folder.iterdir()), None) is not None
        if is_used:
            raise DataError(f"output {self.folder}", "it is no folder of answers", "give a new or an empty one")
        return None

    def write_request(self, request: BatchRequest) -> None:
        """Write a request into the folder; it replaces an earlier request that has no answers."""
        with self._report_storage_errors():
            write_json(self.request_file, request.model_dump(mode="json"))

    def check_request(self, request: BatchRequest, is_first: bool) -> None:
        """Raise DataError, which names the differences, if the folder belongs to another request.

        If `is_first`, the folder may also hold no request, or another request without any answers.
        """
        stored_request = self.stored_request()
        if is_first and (stored_request is None or not self.present_chunks()):
            return
        differences = stored_request.differences(request) if stored_request else ["it holds no request"]
        if differences:
            reason = f"it is for another request: {', '.join(differences)}"
            raise DataError(f"output {self.folder}", reason, "give the same request again, or another folder")

    def present_chunks(self) -> set[int]:
        """Return the numbers of the chunks whose files are in the folder."""
        with self._report_storage_errors():
            matches = [_CHUNK_NAME.fullmatch(path.name) for path in self.folder.glob("chunk-*")]
        return {int(match[1]) for match in matches if match}

    def missing_chunks(self, request: BatchRequest) -> list[int]:
        """Return the numbers of the chunks without a file, in ascending order."""
        present_chunks = self.present_chunks()
        return [chunk for chunk in range(request.chunk_count) if chunk not in present_chunks]

    def write_chunk(self, request: BatchRequest, chunk: int, content: bytes) -> None:
        """Write the file of a chunk, which appears in one step, when it is complete."""
        with self._report_storage_errors():
            replace_file(self.chunk_file(request, chunk), content)

    def count_chunk(self, request: BatchRequest, chunk: int) -> AnswerCounts:
        """Count the answers in the file of a chunk; damage or a wrong number of rows is a DataError."""
        path = self.chunk_file(request, chunk)
        with self._report_storage_errors():
            content = path.read_bytes()
        try:
            counts = FORMATS[request.input.format].count(content)
        # Another program may have written something else into the file.
        except (*PYARROW_ERRORS, TypeError, RecursionError) as e:
            raise DataError(f"file {path}", "it is damaged", "remove it, then give the command again") from e
        if counts.rows != request.rows_of(chunk):
            reason = f"it has {counts.rows} rows, not {request.rows_of(chunk)}"
            raise DataError(f"file {path}", reason, "remove it, then give the command again")
        return counts

    def stored_summary(self) -> AnswerCounts | None:
        """Return the counts of all answers; None if the folder has never been complete."""
        return self._read_model(self.summary_file, AnswerCounts)

    def complete(self, counts: AnswerCounts) -> None:
        """Mark the folder as complete; no process may still be writing chunks, as partial files are removed."""
        with self._report_storage_errors():
            # Workers that were killed while they wrote a chunk leave partial files.
            remove_partial_files(self.folder)
            write_json(self.summary_file, counts.model_dump())

    def _read_model(self, path: Location, model: type[M]) -> M | None:
        """Read a JSON file of the folder, if it exists; unfitting content is a DataError."""
        with self._report_storage_errors():
            content = path.read_text() if path.exists() else None
        try:
            return None if content is None else model.model_validate_json(content)
        except ValidationError as e:
            raise DataError(f"file {path}", "it is damaged, or of another version", "give another output folder") from e
