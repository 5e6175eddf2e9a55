"""The `data` section: where raw text is, its format, how it is mixed, and where the prepared shards go."""

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
"""File name suffixes of the formats that are recognized by them; the other formats are recognized by their folders
(`find.py`)."""


Weight = Annotated[float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(gt=0, le=1e18)]
"""Weights and shares may be token counts as well as fractions: only their ratios matter."""
Epochs = Annotated[float, Field(gt=0, le=1e6)]


class SourceMix(Section):
    """A source's weight and how its subfolders share it; in a schedule, a key that is left out stays unchanged."""

    weight: Weight | None = None
    alpha: float | None = Field(default=None, ge=0, le=1)
    """Temperature between subfolders; in a schedule it replaces `shares` of the source, if there are any."""
    shares: dict[str, Share] | None = Field(default=None, min_length=1)
    """Fixed shares by subfolder; in a schedule they replace `alpha`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha is not None:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        return self

    def changed(self, by: "SourceMix") -> "SourceMix":
        """Return this mix with the keys of `by` in place of its own."""
        within = self if by.alpha is None and by.shares is None else by
        weight = self.weight if by.weight is None else by.weight
        return SourceMix(weight=weight, alpha=within.alpha, shares=within.shares)


class PhaseSpec(Section):
    from_step: PositiveInt
    """Number of optimizer steps done before this phase begins."""
    sources: dict[str, SourceMix] = Field(min_length=1)
    """Changes to the mix, by source."""


SourceName = Annotated[str, Field(pattern=r"^[^/]+$")]
"""Source name: the part of a domain's name before its first slash."""


class SourceSpec(Section):
    """Raw text: a folder with one subfolder per domain (RedPajama) or per language, or the files themselves."""

    path: str
    """Path of a folder or a file, or a pattern with * and **. It is local, or on s3:// or gs://, where a query may name
    the server as pyarrow understands it: s3://bucket/folder?region=eu-west-1&endpoint_override=storage.example:9000."""
    format: Format | None = None
    """Format of the files; by default recognized by their names. `jsonl` is the format of RedPajama-1T and of most
    others."""
    text_field: str | None = Field(default=None, min_length=1)
    """Key or column that holds the text; by default `raw_content` in redpajama-v2, `text` elsewhere."""
    delimiter: str | None = None
    """Line that ends a document in format text, if it consists of exactly this ("" is a blank line); by default a file
    is one document."""
    filters: FilterSpec | None = None
    """Filters for format redpajama-v2, which select the documents to keep."""
    weight: Weight = 1.0
    """Weight of this source in the mixture, relative to the other sources; 0 if only the schedule brings it in."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Temperature between subfolders: q_i = p_i^alpha / sum_j p_j^alpha, with p_i the share of tokens."""
    shares: dict[str, Share] | None = Field(default=None, min_length=1)
    """Fixed shares by subfolder, instead of `alpha`; subfolders that are not named are left out."""
    max_epochs: Epochs | None = None
    """Largest number of epochs of each subfolder over the whole training. Samples that a subfolder cannot provide come
    from the source's other subfolders in proportion, and from the other sources once all of them have reached their
    limits."""
    max_epochs_of: dict[str, Epochs] = Field(default_factory=dict)
    """Largest number of epochs of single subfolders, by name; takes precedence over `max_epochs`."""

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
        """Mix of this source at the start of training."""
        return SourceMix(weight=self.weight, alpha=None if self.shares else self.alpha, shares=self.shares)

    def check_format(self, format: Format) -> None:
        """Check that the keys of this source apply to a format.

        Raises:
            ValueError: a key is set that the format does not use.
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
    """Changes of the mixture during training, by step."""
    prepared: Path
    """Folder for the packed token shards, which `data prepare` writes once and training only reads. If it lies below a
    source's path, it is not part of that source."""
    seq_len: PositiveInt
    """T: number of tokens that the model sees at once. A stored sample has T + 1 tokens, the last T of which are the
    targets."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill samples. concat: documents follow each other and are cut wherever a sample ends. best_fit:
    documents that fit into a sample stay whole; samples are filled up with padding, whose targets do not count."""
    tokenizer: Path | None = None
    """Path of a tokenizer.json, or of a vocabulary in tiktoken's format; by default a tokenizer is trained on the
    sources."""
    tokenizer_pattern: str | None = Field(default=None, min_length=1)
    """Rule by which text is split before the ranks of a vocabulary in tiktoken's format apply, as a name (gpt2, cl100k,
    o200k or qwen2) or as a regular expression."""
    tokenizer_model: Literal["bpe", "unigram"] | None = None
    """Kind of tokenizer to train, byte-level in either case; by default bpe. unigram takes several times as long to
    train."""
    tokenizer_train_mb: PositiveFloat | None = None
    """Amount of text that the tokenizer is trained on, in millions of characters, by default 20: a sample of all
    domains in the proportions of the mixture."""
    validation_fraction: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents held out for validation, chosen by a hash of their text."""
    validation_samples: PositiveInt = 512
    """Largest number of held-out samples that are kept, spread evenly over all of them."""
    max_document_mb: PositiveFloat = 32.0
    """Largest size of a document in MB, as it is stored (its line, its text file, its value in a column); larger ones
    are quarantined."""
    max_bad_lines: NonNegativeInt = 0
    """Number of unreadable lines, rows or text files that are quarantined; one more stops the job."""
    max_bad_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of all lines, rows and text files that may be unreadable, used instead of `max_bad_lines` if it allows
    more."""
    max_bad_files: NonNegativeInt = 0
    """Number of files that may be partly lost (truncated, damaged, vanished); one more stops the job. What was read of
    them is used."""

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
        """Complete mix of every source, by the step at which it begins; the first is step 0."""
        now = {name: source.mix for name, source in self.sources.items()}
        result = {0: now}
        for phase in self.schedule:
            now = now | {name: now[name].changed(mix) for name, mix in phase.sources.items()}
            result[phase.from_step] = now
        return result

    def subfolders(self, source: str) -> list[str] | None:
        """Return the sorted subfolders that any phase names in the shares of a source; None if some phase uses all
        subfolders."""
        shares = [mixes[source].shares for mixes in self.mixes.values()]
        return sorted({sub for s in shares if s for sub in s}) if all(shares) else None


def absolute(base: Path, path: str) -> str:
    """Return a local path taken from `base`; a URI is returned unchanged."""
    return path if "://" in path else str(base / path)
