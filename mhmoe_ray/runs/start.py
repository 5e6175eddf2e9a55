"""start.json of a run: the models that it started from, and the models that these started from."""

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
    """Path of the checkpoint or the folder."""
    step: int
    """Step of the checkpoint in its run; 0 for a model from elsewhere."""
    tokens: int
    """Number of tokens that the model was trained on, together with its own ancestors; 0 for a model from elsewhere."""
    start: "StartRecord | None" = None
    """Start of the ancestor's own run; None if that run began with random weights, or if it was imported."""

    def describe(self) -> str:
        """Return the name with step and tokens, as a text."""
        return f"{self.name}, step {self.step:,}, {self.tokens:,} tokens" if self.tokens else self.name


class StartRecord(BaseModel):
    """Start of a run: its ancestors, and how it got its weights from them."""

    how: Literal["copy", "upcycle", "mix"]
    optimizer: bool
    """True if the optimizer's state was copied too."""
    ancestors: list[Ancestor]
    samples_before: dict[str, int] = {}
    """Number of samples of each domain that earlier runs have read, if the run continues their order."""

    @property
    def tokens(self) -> int:
        """The number of tokens that all ancestors together were trained on."""
        return sum(ancestor.tokens for ancestor in self.ancestors)

    def lines(self) -> Iterator[str]:
        """Yield a line for each ancestor, from the nearest to the furthest; ancestors of an ancestor are indented."""
        verb = {"copy": "copied from", "upcycle": "upcycled from", "mix": "mixed from"}[self.how]
        suffix = ", with the optimizer's state" if self.optimizer else ""
        for ancestor in self.ancestors:
            yield f"{verb} {ancestor.describe()}{suffix}"
            if ancestor.start is not None:
                yield from (f"  {line}" for line in ancestor.start.lines())


def read_start(run: RunDir) -> StartRecord | None:
    """Return the record of the start of a run; None if the run began with random weights, or has not begun."""
    if not run.start_file.exists():
        return None
    return StartRecord.model_validate(json.loads(run.start_file.read_text()))


def write_start(run: RunDir, record: StartRecord) -> None:
    """Write the record of the start of a run, atomically."""
    write_json(run.start_file, record.model_dump(mode="json"))
