"""The worker of a batch inference: an actor that answers chunks of input rows with one engine."""

import asyncio
import pickle
import socket
from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import pyarrow as pa

from mhmoe_ray.errors import MhmoeError, ServeError
from mhmoe_ray.serving.answer import check_biases, join_pieces
from mhmoe_ray.serving.batch.formats import FORMATS
from mhmoe_ray.serving.batch.output import BatchOutput
from mhmoe_ray.serving.batch.request import BatchRequest
from mhmoe_ray.serving.batch.rows import AnswerCounts, RowAnswer, parse_row
from mhmoe_ray.serving.engine import EngineError, Request
from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import location

BLOCK_COLUMN = "pickle"
MIN_CHUNKS_AT_A_TIME = 2
"""Smallest number of chunks that a worker computes at the same time.

The rows of the second chunk fill the engine while the last answers of the first are computed.
"""


class RowChunk(NamedTuple):
    """A chunk of input rows on its way from the reading task to a worker."""

    number: int
    rows: bytes
    """Rows of the chunk, as `Format.read_tables` yields them, in Arrow's stream format; empty if reading failed."""
    error: MhmoeError | None = None
    """Error that ended the reading of the input."""

    @classmethod
    def of_table(cls, number: int, table: pa.Table) -> "RowChunk":
        # Pickling a slice of a table would write all of the table, and Arrow's format writes only the slice.
        content = pa.BufferOutputStream()
        with pa.ipc.new_stream(content, table.schema) as writer:
            writer.write_table(table)
        return cls(number, content.getvalue().to_pybytes())


class ChunkResult(NamedTuple):
    """Result of the work on a chunk of rows, whose answers are in the output folder."""

    chunk: int
    counts: AnswerCounts
    error: MhmoeError | None
    """Error that kept the chunk from being answered."""


# Errors are passed as values, because Ray Data changes the message of an exception and wraps it.
def as_block(value: RowChunk | ChunkResult) -> pa.Table:
    """Pack a chunk or a result into a table of one row for Ray Data; `pickle.loads` of its column unpacks it."""
    return pa.table({BLOCK_COLUMN: pa.array([pickle.dumps(value)], pa.large_binary())})


def chunks_at_a_time(request: BatchRequest, spec: ServeSpec) -> int:
    """Return how many chunks a worker computes at a time, so that its engine always has waiting requests."""
    return max(MIN_CHUNKS_AT_A_TIME, ceil(2 * spec.max_concurrency / request.chunk_rows))


class ChunkWorker:
    """Callable of Ray Data that answers the rows of a chunk and writes them to the output folder.

    Several threads call it, each with one chunk, and the engine computes all their rows together.
    """

    def __init__(self, request: BatchRequest, spec: ServeSpec, output: BatchOutput) -> None:
        # The import is here because the job's driver imports this module, and needs no model.
        from mhmoe_ray.serving.load import load_answerer

        self._request, self._output = request, output
        # The engine refuses requests beyond `max_waiting`, so this limit is set to the number of rows of all chunks
        # that are computed at a time.
        spec = spec.model_copy(update={"max_waiting": chunks_at_a_time(request, spec) * request.chunk_rows})
        self._load_error: MhmoeError | None = None
        try:
            self._answerer = load_answerer(location(request.checkpoint), spec)
            check_biases(request.sampling, self._answerer.tokenizer_size)
        # An error in the constructor of an actor loses its type, so the first chunk reports it.
        except MhmoeError as e:
            self._load_error = e
        except EngineError as e:
            self._load_error = _engine_error(e)

    def __del__(self) -> None:
        # An engine must be closed before its process ends.
        if hasattr(self, "_answerer"):
            self._answerer.engine.close()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer a chunk, write its file, and return the result or an error for the user, both packed by `as_block`."""
        chunk: RowChunk = pickle.loads(block[BLOCK_COLUMN][0].as_py())
        try:
            return as_block(ChunkResult(chunk.number, self._answer_chunk(chunk), None))
        except MhmoeError as e:
            return as_block(ChunkResult(chunk.number, AnswerCounts(), e))

    def _answer_chunk(self, chunk: RowChunk) -> AnswerCounts:
        if error := chunk.error or self._load_error:
            raise error
        request, file_format = self._request, FORMATS[self._request.input.format]
        with pa.ipc.open_stream(chunk.rows) as reader:
            table = reader.read_all()
        try:
            answers = asyncio.run(self._answer_rows(file_format.table_rows(table), chunk.number * request.chunk_rows))
        except EngineError as e:
            raise _engine_error(e) from e
        content = file_format.encode(table, answers, request.sampling.logprobs is not None)
        self._output.write_chunk(request, chunk.number, content)
        return AnswerCounts.of_rows([answer._asdict() for answer in answers])

    async def _answer_rows(self, rows: Sequence[Any], first_row: int) -> list[RowAnswer]:
        """Return the answers to decoded rows, computed at the same time; `first_row` counts in the input from 0."""
        return await asyncio.gather(*(self._answer_row(value, first_row + i) for i, value in enumerate(rows)))

    async def _answer_row(self, value: Any, row: int) -> RowAnswer:
        """Return the answer to row `row` of the input, or its error if the model cannot read the row's prompt."""
        sampling, answerer, prompt = self._request.sampling, self._answerer, parse_row(value)
        prompt_tokens: int | None = None
        try:
            if isinstance(prompt, str):
                ids = answerer.encode(prompt)
            else:
                # `mhmoe generate` refuses an input with conversations if the run has no chat template.
                assert answerer.template is not None
                ids = answerer.encode_chat(answerer.template, prompt)
            prompt_tokens = len(ids)
            answerer.check_length(ids, has_answer=True)
        except ServeError as e:
            return RowAnswer(prompt_tokens=prompt_tokens, error=f"{e.subject}: {e.reason}")
        request = Request(tuple(ids), sampling.for_answer(row))
        pieces = [piece async for piece in answerer.answer(request)]
        return RowAnswer.from_piece(join_pieces(pieces), prompt_tokens, sampling.logprobs is not None)


def _engine_error(error: EngineError) -> ServeError:
    return ServeError(
        f"the engine on {socket.gethostname()}", str(error), "see the job's log, then give the command again"
    )
