"""What the job is asked for and what it finds.

The survey comes back as JSON in lines of the job's log, which is there on any cluster: raw text that is only looked at
has no folder to leave a file in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import BaseModel, TypeAdapter

from mhmoe_ray.data.inspect import REPORT
from mhmoe_ray.data.inspect.copies import Copies
from mhmoe_ray.data.inspect.figures import DomainSurvey
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.spec.load import packed, unpacked

_PIECE = 8_000  # characters of a line: Ray sends a log in chunks of 20,000


class Request(BaseModel):
    data: DataSpec
    tokenizer: Path | None
    """Counts tokens; None for none."""
    rules: bool
    """Whether texts are held against textrules.py."""

    def packed(self) -> str:
        """As an environment variable holds it."""
        return packed(self.model_dump_json())

    @classmethod
    def unpacked(cls, text: str) -> Self:
        return cls.model_validate_json(unpacked(text))


@dataclass
class Survey:
    tokenized: bool
    domains: dict[str, DomainSurvey] = field(default_factory=dict)
    """By name, in the order of names."""
    copies: Copies = field(default_factory=Copies)


_SURVEY = TypeAdapter(Survey)


def lines_of(found: Survey) -> Iterator[str]:
    whole = _SURVEY.dump_json(found, ensure_ascii=True).decode()
    for i in range(0, len(whole), _PIECE):
        yield REPORT + whole[i : i + _PIECE]


def survey_in(log: str) -> Survey | None:
    """The one whose lines are in a job's log; None if there is none."""
    pieces = [line.removeprefix(REPORT) for line in log.splitlines() if line.startswith(REPORT)]
    return _SURVEY.validate_json("".join(pieces)) if pieces else None
