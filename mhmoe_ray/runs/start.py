"""File start.json of a run: the models that the run started from, and their own ancestors."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import RunError
from mhmoe_ray.runs.directory import RunDir, report_read_errors
from mhmoe_ray.storage import read_file, report_write_errors, write_json


class Ancestor(BaseModel):
    """Model that a run started from."""

    name: str
    """Id of a run, path of a folder, or hf:ORGANIZATION/NAME@REVISION."""
    path: str
    """Path of the checkpoint, or of the folder with the model."""
    step: int
    """Training step of the checkpoint; 0 for a model that was not trained here."""
    tokens: int
    """Number of training tokens of the model and its ancestors; 0 for a model not trained here."""
    start: "StartRecord | None" = None

    def describe(self) -> str:
        """Return a text with the model's name, step and number of training tokens."""
        return f"{self.name}, step {self.step:,}, {self.tokens:,} tokens" if self.tokens else self.name


class StartRecord(BaseModel):
    """Record of the models from which a run got its first weights, and in which way."""

    how: Literal["copy", "upcycle", "mix"]
    optimizer: bool
    ancestors: list[Ancestor]
    samples_before: dict[str, int] = {}
    """Samples per domain that earlier runs have read, if the run continues their order."""

    @property
    def tokens(self) -> int:
        return sum(ancestor.tokens for ancestor in self.ancestors)

    def lines(self) -> Iterator[str]:
        """Yield a line of text for each ancestor, followed by those of its own ancestors, indented."""
        verb = {"copy": "copied from", "upcycle": "upcycled from", "mix": "mixed from"}[self.how]
        suffix = ", with the optimizer's state" if self.optimizer else ""
        for ancestor in self.ancestors:
            yield f"{verb} {ancestor.describe()}{suffix}"
            if ancestor.start is not None:
                yield from (f"  {line}" for line in ancestor.start.lines())


def read_start(run: RunDir) -> StartRecord | None:
    """Return the record of a run's start; None if its weights were random, or it has not begun."""
    with report_read_errors(run.start_file):
        if not run.start_file.exists():
            return None
        try:
            return StartRecord.model_validate_json(read_file(run.start_file))
        except ValidationError as e:
            fix = "restore that file, or remove it"
            raise RunError(f"run {run.id}", f"its {run.start_file.name} is damaged", fix) from e


def write_start(run: RunDir, record: StartRecord) -> None:
    """Write start.json atomically; a failed write is a StorageError."""
    with report_write_errors(run.start_file):
        write_json(run.start_file, record.model_dump(mode="json"))
