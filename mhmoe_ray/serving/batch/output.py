"""The output folder of a batch inference.

    _request.json            the request, written before its first job starts
    chunk-00000000.jsonl     the rows of chunk 0 with their answers; .parquet if the input is in Parquet
    _summary.json            the numbers of answers and tokens, written when the files of all chunks exist

The file of a chunk appears in one step, when it is complete, so the existing files show which rows are answered. In the
order of their names, the files hold all rows in the order of the input. Programs that read a folder of Parquet files
ignore names that begin with an underscore.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mhmoe_ray.data.sources.columns import PYARROW_ERRORS
from mhmoe_ray.data.sources.storage import short_message
from mhmoe_ray.errors import DataError, StorageError
from mhmoe_ray.serving.batch.formats import FORMATS
from mhmoe_ray.serving.batch.request import BatchRequest
from mhmoe_ray.serving.batch.rows import AnswerCounts
from mhmoe_ray.storage import Location, remove_partial_files, replace_file, write_json

M = TypeVar("M", bound=BaseModel)
_CHUNK_NAME = re.compile(r"chunk-(\d{8,})\.\w+")


@dataclass(frozen=True)
class BatchOutput:
    """Output folder of a batch inference; it may not exist yet.

    All methods raise a StorageError if the folder cannot be read or written.
    """

    folder: Location

    @contextmanager
    def _report_storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            fix = "correct the path or repair its storage, then give the command again"
            raise StorageError(f"output {self.folder}", e.strerror or short_message(e), fix) from e

    @property
    def request_file(self) -> Location:
        return self.folder / "_request.json"

    @property
    def summary_file(self) -> Location:
        return self.folder / "_summary.json"

    def chunk_file(self, request: BatchRequest, chunk: int) -> Location:
        """Return the path of the file with the answers to a chunk of rows."""
        return self.folder / f"chunk-{chunk:08d}{FORMATS[request.input.format].suffix}"

    def stored_request(self) -> BatchRequest | None:
        """Return the request that the folder holds; None if it holds none.

        Raises:
            DataError: the request is damaged, or the folder holds files but no request.
        """
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
        """Check that the folder belongs to a request.

        Args:
            request: the request whose answers are to be written.
            is_first: whether the folder may also hold no request, or another request without any answers.

        Raises:
            DataError: the folder belongs to another request; the error names the differences.
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
        """Return the numbers of the chunks whose files are not in the folder yet, in ascending order."""
        present_chunks = self.present_chunks()
        return [chunk for chunk in range(request.chunk_count) if chunk not in present_chunks]

    def write_chunk(self, request: BatchRequest, chunk: int, content: bytes) -> None:
        """Write the file with the answers to a chunk of rows; it appears in one step, when it is complete."""
        with self._report_storage_errors():
            replace_file(self.chunk_file(request, chunk), content)

    def count_chunk(self, request: BatchRequest, chunk: int) -> AnswerCounts:
        """Count the answers and tokens in the file of a chunk.

        Raises:
            DataError: the file is damaged, or has another number of rows than the chunk.
        """
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
        """Write the counts of all answers, which marks the folder as complete.

        No process may still be writing chunks, because files that are not complete are removed.
        """
        with self._report_storage_errors():
            # Workers that were killed while they wrote a chunk leave partial files.
            remove_partial_files(self.folder)
            write_json(self.summary_file, counts.model_dump())

    def _read_model(self, path: Location, model: type[M]) -> M | None:
        """Read a JSON file of the folder into a Pydantic model; return None if there is no such file.

        Raises:
            DataError: the content of the file does not fit the model.
        """
        with self._report_storage_errors():
            content = path.read_text() if path.exists() else None
        try:
            return None if content is None else model.model_validate_json(content)
        except ValidationError as e:
            raise DataError(f"file {path}", "it is damaged, or of another version", "give another output folder") from e
