"""The `data` section: where raw text lies, its format, how it is mixed, and where the prepared shards go."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.filters import FilterSpec
from mhmoe_ray.storage import refuse_password

Format = Literal["jsonl", "redpajama-v2", "parquet", "text", "huggingface"]

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".txt.gz", ".txt.zst"),
}
"""Of those whose files are known by their names' ends; the others are known by their folders (`find.py`)."""


Weight = Annotated[float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(gt=0, le=1e18)]
"""Both may be counts of tokens as well as fractions: only ratios count."""
Epochs = Annotated[float, Field(gt=0, le=1e6)]


class SourceMix(Section):
    """A source's part and how its subfolders share it; in a schedule, a key left out stays as it was."""

    weight: Weight | None = None
    alpha: float | None = Field(default=None, ge=0, le=1)
    """In the place of `shares`, where the source had some."""
    shares: dict[str, Share] | None = Field(default=None, min_length=1)
    """In the place of `alpha`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha is not None:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        return self

    def changed(self, by: "SourceMix") -> "SourceMix":
        """This mix with the other's keys in place of its own."""
        within = self if by.alpha is None and by.shares is None else by
        weight = self.weight if by.weight is None else by.weight
        return SourceMix(weight=weight, alpha=within.alpha, shares=within.shares)


class PhaseSpec(Section):
    from_step: PositiveInt
    """Optimizer steps done before it."""
    sources: dict[str, SourceMix] = Field(min_length=1)
    """What changes, by source."""


SourceName = Annotated[str, Field(pattern=r"^[^/]+$")]
"""The part of a domain's name before its first slash."""


class SourceSpec(Section):
    """Raw text: a folder with one subfolder per domain (RedPajama) or per language, or the files themselves."""

    path: str
    """A folder, a file, or a pattern with * and **; local, or on s3:// or gs://, where a query may name the server as
    pyarrow understands it: s3://bucket/folder?region=eu-west-1&endpoint_override=storage.example:9000."""
    format: Format | None = None
    """Absent: told by the names of the files. `jsonl` is RedPajama-1T's and most others'."""
    text_field: str | None = Field(default=None, min_length=1)
    """Key or column that holds the text; absent: `raw_content` in redpajama-v2, `text` elsewhere."""
    delimiter: str | None = None
    """Of format text: a line of just this ends a document ("" is a blank line); absent: a file is a document."""
    filters: FilterSpec | None = None
    """Of format redpajama-v2: what is kept of it."""
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

    @field_validator("path")
    @classmethod
    def _without_password(cls, path: str) -> str:
        refuse_password(path)
        return path

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha != 1.0:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        if self.delimiter is not None and not {"\n", "\r"}.isdisjoint(self.delimiter):
            raise ValueError('delimiter is a line without its line break: "" is a blank one')
        if self.format is not None:
            self.check_format(self.format)
        return self

    @property
    def mix(self) -> SourceMix:
        """As the training begins."""
        return SourceMix(weight=self.weight, alpha=None if self.shares else self.alpha, shares=self.shares)

    def check_format(self, format: Format) -> None:
        """Raises:
        ValueError: a key is set that this format has no use for.
        """
        if self.filters is not None and format != "redpajama-v2":
            raise ValueError(f"filters go by RedPajama-V2's signals and tables, which format {format} does not have")
        if self.delimiter is not None and format != "text":
            raise ValueError(f"delimiter is for format text, and this is {format}")
        if self.text_field is not None and format == "text":
            raise ValueError("text_field is for records, and format text has none")


class DataSpec(Section):
    sources: dict[SourceName, SourceSpec] = Field(min_length=1)
    schedule: list[PhaseSpec] = Field(default_factory=list)
    """Changes of the mixture in the course of the training, by step."""
    prepared: Path
    """Folder for the packed token shards; made once by `data prepare`, then only read. Below a source's path it is no
    part of the source."""
    seq_len: PositiveInt
    """T: tokens a model sees at once; a stored sample has T + 1, its last T are the targets."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents one after another, cut wherever a sample ends. best_fit: documents that fit into a sample stay
    whole; samples are filled up with padding, whose targets do not count."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a vocabulary in tiktoken's format; absent: one is trained on the sources."""
    tokenizer_pattern: str | None = Field(default=None, min_length=1)
    """Of a vocabulary in tiktoken's format: how text is split before its ranks apply, as gpt2, cl100k, o200k or qwen2,
    or as a regular expression."""
    tokenizer_model: Literal["bpe", "unigram"] | None = None
    """The kind that is trained, byte-level either way; bpe unless it says otherwise. unigram takes several times as
    long to train."""
    tokenizer_train_mb: PositiveFloat | None = None
    """Text that it is trained on, in millions of characters, 20 unless it says otherwise: a sample of all domains in
    the proportions of the mixture."""
    validation_fraction: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents held out for validation, chosen by a hash of their text."""
    validation_samples: PositiveInt = 512
    """At most this many held-out samples are kept, spread evenly over all of them."""
    max_document_mb: PositiveFloat = 32.0
    """A document that takes more MB as it is stored (its line, its text file, its value in a column) is quarantined."""
    max_bad_lines: NonNegativeInt = 0
    """Lines, rows or text files that cannot be read are quarantined up to this number; one more stops the job."""
    max_bad_share: float = Field(default=0.0, ge=0, lt=1)
    """Or up to this share of all of them, where that is more."""
    max_bad_files: NonNegativeInt = 0
    """Files of which a part is lost (cut off, damaged, vanished) before the job stops; what was read is used."""

    @field_validator("prepared", "tokenizer", mode="before")
    @classmethod
    def _is_a_path(cls, given: object) -> object:
        if "://" in str(given):
            raise ValueError("it must be a path on a file system that the nodes share, not a URI")
        return given

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
        if self.tokenizer is None and self.tokenizer_pattern is not None:
            raise ValueError("tokenizer_pattern is for a given vocabulary in tiktoken's format: give tokenizer as well")
        for key in ("tokenizer_model", "tokenizer_train_mb"):
            if self.tokenizer is not None and getattr(self, key) is not None:
                raise ValueError(f"a tokenizer is given and none is trained, so {key} would be ignored")
        return self

    @property
    def train_mb(self) -> float:
        """Millions of characters that a tokenizer is trained on."""
        return self.tokenizer_train_mb or 20.0

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


def absolute(base: Path, path: str) -> str:
    """The local path from `base`; a URI as it is."""
    return path if "://" in path else str(base / path)
