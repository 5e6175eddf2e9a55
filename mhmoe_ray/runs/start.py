"""File start.json of a run: the models that the run started from, and the models that these started from."""

import json
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel

from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import write_json


class Ancestor(BaseModel):
    """Model that a run started from."""

    name: str
    """Id of a run, path of a folder, or hf:ORGANIZATION/NAME@REVISION."""
    path: str
    """Path of the checkpoint, or of the folder with the model."""
    step: int
    """Training step of the checkpoint in its run; 0 for a model that was not trained here."""
    tokens: int
    """Number of tokens that the model and its own ancestors were trained on; 0 for a model not trained here."""
    start: "StartRecord | None" = None
    """Record of the models that the ancestor's own run started from; None without any, or for an imported run."""

    def describe(self) -> str:
        """Return a text with the name of the model, its training step and its number of training tokens."""
        return f"{self.name}, step {self.step:,}, {self.tokens:,} tokens" if self.tokens else self.name


class StartRecord(BaseModel):
    """Record of how a run got its first weights: from which models, and in which way."""

    how: Literal["copy", "upcycle", "mix"]
    optimizer: bool
    """True if the optimizer's state was copied too."""
    ancestors: list[Ancestor]
    samples_before: dict[str, int] = {}
    """Number of samples per domain that earlier runs have read, if the run continues their order of samples."""

    @property
    def tokens(self) -> int:
        """Number of tokens that all ancestors together were trained on."""
        return sum(ancestor.tokens for ancestor in self.ancestors)

    def lines(self) -> Iterator[str]:
        """Yield a line of text for each ancestor of the run; the ancestors of an ancestor follow it, indented."""
        verb = {"copy": "copied from", "upcycle": "upcycled from", "mix": "mixed from"}[self.how]
        suffix = ", with the optimizer's state" if self.optimizer else ""
        for ancestor in self.ancestors:
            yield f"{verb} {ancestor.describe()}{suffix}"
            if ancestor.start is not None:
                yield from (f"  {line}" for line in ancestor.start.lines())


def read_start(run: RunDir) -> StartRecord | None:
    """Return the record of the models that a run started from; None if its weights were random, or it has not begun."""
    if not run.start_file.exists():
        return None
    return StartRecord.model_validate(json.loads(run.start_file.read_text()))


def write_start(run: RunDir, record: StartRecord) -> None:
    """Write the record of the models that a run started from, atomically."""
    write_json(run.start_file, record.model_dump(mode="json"))
