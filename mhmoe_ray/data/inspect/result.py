"""Request for a survey that `mhmoe data inspect` and `lint` send to their job, and its result."""

from dataclasses import dataclass, field
from typing import ClassVar

from mhmoe_ray.data.inspect.copies import Copies
from mhmoe_ray.data.inspect.figures import DomainSurvey
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.spec import DataSpec
from mhmoe_ray.spec.base import StoragePath


@dataclass
class Survey:
    """Statistics and problems of each domain, and counts of duplicates."""

    tokenized: bool
    """True if tokens were counted, which needs a tokenizer."""
    domains: dict[str, DomainSurvey] = field(default_factory=dict)
    """Survey of each domain, in the order of names."""
    copies: Copies = field(default_factory=Copies)


class SurveyRequest(RemoteJob[Survey]):
    """Request for a survey of the raw text that the data section of a spec names."""

    module: ClassVar[str] = "mhmoe_ray.data.inspect.job"
    kind: ClassVar[str] = "inspect"
    # The job writes its result, which has this type, to its log: raw text has no prepared folder for a result file.
    result_type: ClassVar[type] = Survey

    data: DataSpec
    tokenizer: StoragePath | None
    """Tokenizer file with which tokens are counted; None to count no tokens."""
    rules: bool
    """True to check texts against the rules of textrules.py."""

    def execute(self) -> None:
        # Only the job needs Ray; the command line imports this module without it.
        from mhmoe_ray.data.inspect.survey import survey

        self.answer(survey(self))
