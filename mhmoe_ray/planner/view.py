"""The interface of the lines and tables that commands show of a family's models."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from mhmoe_ray.spec import ModelSpec, RunSpec


class FigureTable(NamedTuple):
    """Table of an evaluation's results; the first column has names, the others have numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()
    """Lines of text below the table."""


class FamilyView(ABC):
    """View of one family's models."""

    def summary(self, spec: RunSpec) -> dict[str, str]:
        """Return the lines of a plan's summary that only this family has, by their titles."""
        return {}

    @abstractmethod
    def micro_batch(self, spec: RunSpec) -> str:
        """Return the size of a micro-batch as text."""

    def tables(self, figures: Any) -> list[FigureTable]:
        """Return the tables of the results of an evaluation that only this family has."""
        return []


class DecoderView(FamilyView):
    """View of decoders."""

    def micro_batch(self, spec: RunSpec) -> str:
        return f"{spec.train.micro_batch_size} x {spec.data.seq_len} tokens"


def view_of(model: ModelSpec) -> FamilyView:
    """Return the view of the family of a model."""
    view: type[FamilyView] = model.family.part("view")
    return view()
