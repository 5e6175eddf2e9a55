"""The `data` section: where raw text lies, how it is mixed, and where the prepared token shards go."""

from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.mix import Epochs, PhaseSpec, Share, SourceMix, Weight


class SourceSpec(Section):
    """A folder with one subfolder per domain (RedPajama) or per language, each holding JSON-lines files."""

    path: Path
    weight: Weight = 1.0
    """This folder's part of the mixture, relative to the other sources; 0 where only the schedule brings it in."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Temperature between subfolders: q_i = p_i^alpha / sum_j p_j^alpha with p_i the share of tokens."""
    shares: dict[str, Share] | None = Field(default=None, min_length=1)
    """Fixed shares per subfolder instead of `alpha`; subfolders not named are left out."""
    max_epochs: Epochs | None = None
    """At most so many epochs of each subfolder in the whole training. What it is short of goes to the source's other
    subfolders in proportion, and where all of them are at their limits, to the other sources."""
    max_epochs_of: dict[str, Epochs] = Field(default_factory=dict)
    """The same for single subfolders, before `max_epochs`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha != 1.0:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        return self

    @property
    def mix(self) -> SourceMix:
        """As the training begins."""
        return SourceMix(weight=self.weight, alpha=None if self.shares else self.alpha, shares=self.shares)


class DataSpec(Section):
    sources: dict[str, SourceSpec] = Field(min_length=1)
    schedule: list[PhaseSpec] = Field(default_factory=list)
    """Changes of the mixture in the course of the training, by step."""
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = [phase.from_step for phase in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"schedule must be by from_step, each once, and has {', '.join(map(str, steps))}")
        unknown = sorted({name for phase in self.schedule for name in phase.sources} - self.sources.keys())
        if unknown:
            raise ValueError(f"schedule names {unknown[0]!r}, which is no source: {', '.join(self.sources)} are")
        for step, mixes in self.mixes.items():
            if not any(mix.weight for mix in mixes.values()):
                raise ValueError(f"every source has weight 0 from step {step} on")
        return self

    @property
    def mixes(self) -> dict[int, dict[str, SourceMix]]:
        """By the step they begin at, from 0: the mix of every source, whole."""
        now = {name: source.mix for name, source in self.sources.items()}
        result = {0: now}
        for phase in self.schedule:
            now = now | {name: now[name].changed(mix) for name, mix in phase.sources.items()}
            result[phase.from_step] = now
        return result

    def subfolders(self, source: str) -> list[str] | None:
        """Those that some phase names in a source's shares; None if a phase takes all there are."""
        shares = [mixes[source].shares for mixes in self.mixes.values()]
        return sorted({sub for s in shares if s for sub in s}) if all(shares) else None
