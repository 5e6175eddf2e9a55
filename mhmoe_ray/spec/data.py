"""The `data` section: where raw text lies, how it is mixed, and where the prepared token shards go."""

from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section


class SourceSpec(Section):
    """A folder with one subfolder per domain (RedPajama) or per language, each holding JSON-lines files."""

    path: Path
    weight: PositiveFloat = 1.0
    """This folder's part of the mixture, relative to the other sources."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Temperature between subfolders: q_i = p_i^alpha / sum_j p_j^alpha with p_i the share of tokens."""
    shares: dict[str, PositiveFloat] | None = None
    """Fixed shares per subfolder instead of `alpha`; subfolders not named are left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha != 1.0:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        return self


class DataSpec(Section):
    sources: dict[str, SourceSpec] = Field(min_length=1)
    prepared: Path
    """Folder for the packed token shards; made once by `data prepare`, then only read."""
    seq_len: PositiveInt
    """T: tokens a model sees at once; a stored sample has T + 1, its last T are the targets."""
    tokenizer: Path | None = None
    """A tokenizer.json; absent: a byte-level BPE is trained on the sources."""
    tokenizer_train_mb: PositiveFloat = 20.0
    """Text used to train that BPE, in MB, taken evenly from all domains and languages."""
    validation_fraction: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents held out for validation, chosen by a hash of their text."""
    validation_samples: PositiveInt = 512
    """At most this many held-out samples are kept, spread evenly over all of them."""
    max_bad_lines: NonNegativeInt = 0
    """Lines that cannot be read are quarantined up to this number; one more stops the job."""
