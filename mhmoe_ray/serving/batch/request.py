"""The request of a batch inference: a checkpoint, a file of rows, and how the answers are sampled."""

from math import ceil
from typing import Literal

from pydantic import BaseModel

from mhmoe_ray.serving.sampling import SamplingParams
from mhmoe_ray.spec.serve import EngineName
from mhmoe_ray.storage import location

CHUNK_ROWS = 128
"""Default number of rows of a chunk; it is small, so that little is lost with a killed worker."""
_HASH_CHARACTERS = 8


InputFormat = Literal["jsonl", "parquet"]


class InputFile(BaseModel):
    """File with the rows whose prompts are to be answered."""

    path: str
    """Path or URI of the file."""
    format: InputFormat
    sha256: str
    rows: int = 0
    """Number of rows; 0 before they are counted."""
    first_chat: int | None = None
    """Number of the first line or row with a conversation, from 1, if any."""

    @property
    def label(self) -> str:
        """Path and start of the file's hash, for messages to the user."""
        return f"{self.path} ({self.sha256[:_HASH_CHARACTERS]})"


class BatchRequest(BaseModel):
    """Request to answer all rows of a file. The output folder stores the request."""

    checkpoint: str
    """Path or URI of the checkpoint directory, inside its run directory."""
    manifest_sha256: str
    """Hash of the checkpoint's manifest, which has the hashes of all weights."""
    input: InputFile
    sampling: SamplingParams
    """Sampling parameters; those of a row depend only on these and its number (`SamplingParams.for_answer`)."""
    engine: EngineName
    precision: Literal["float32", "bfloat16"]
    chunk_rows: int
    """Number of rows of each chunk; the last one may have fewer."""

    @property
    def chunk_count(self) -> int:
        return ceil(self.input.rows / self.chunk_rows)

    def rows_of(self, chunk: int) -> int:
        """Return the number of rows of a chunk."""
        return min(self.chunk_rows, self.input.rows - chunk * self.chunk_rows)

    @property
    def checkpoint_label(self) -> str:
        """Run, checkpoint and start of the manifest's hash, for messages to the user."""
        checkpoint = location(self.checkpoint)
        return f"{checkpoint.parent.parent.name}/{checkpoint.name} ({self.manifest_sha256[:_HASH_CHARACTERS]})"

    def differences(self, request: "BatchRequest") -> list[str]:
        """Describe each difference to another request that would change answers or output files.

        Paths do not count, because a run or an input may be moved between two commands.
        """
        differences = []
        if request.manifest_sha256 != self.manifest_sha256:
            differences.append(f"checkpoint {self.checkpoint_label}, not {request.checkpoint_label}")
        if request.input.sha256 != self.input.sha256:
            differences.append(f"input {self.input.label}, not {request.input.label}")
        fields, other_fields = (
            {**r.sampling.model_dump(), "engine": r.engine, "precision": r.precision, "chunk_rows": r.chunk_rows}
            for r in (self, request)
        )
        differences += [
            f"{name} {_format_value(fields[name])}, not {_format_value(other_fields[name])}"
            for name in fields
            if fields[name] != other_fields[name]
        ]
        return differences


def _format_value(value: object) -> str:
    return "none" if value in (None, [], {}) else str(value)
