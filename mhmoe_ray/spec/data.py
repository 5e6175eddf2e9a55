"""The `data` section: sources of raw text and images, their mixture, the tokenizer, and the folder of shards."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from mhmoe_ray.spec.base import OptionalTokenCount, SampleCount, Section, StepCount, StoragePath
from mhmoe_ray.spec.filters import FilterSpec
from mhmoe_ray.spec.formats import CHAT_FORMATS, FORMATS, IMAGE_COLUMNS, SOURCE_KEYS, Column, Format, formats_with
from mhmoe_ray.spec.parts import Objective
from mhmoe_ray.storage import refuse_password

# Weights and shares have a large upper bound because users may write token counts as well as fractions.
Weight = Annotated[float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(gt=0, le=1e18)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]


class SourceMix(Section):
    """Mixture weight of a source, and the division of the source among its subfolders.

    In a schedule, a key that is left out stays unchanged.
    """

    weight: Weight | None = None
    alpha: float | None = Field(default=None, ge=0, le=1)
    """Temperature of the mixture of subfolders (see `alpha` of a source). In a schedule it replaces the `shares` of the
    source, if it has any."""
    shares: dict[str, Share] | None = Field(default=None, min_length=1)
    """Fixed shares of the subfolders, by name. In a schedule they replace `alpha`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha is not None:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        return self

    def with_changes(self, changes: "SourceMix") -> "SourceMix":
        """Return a copy with the values that `changes` sets; a new `alpha` or `shares` replaces both old values."""
        # `alpha` and `shares` exclude each other, so a new value of one also replaces an old value of the other.
        subfolder_mix = self if changes.alpha is None and changes.shares is None else changes
        weight = self.weight if changes.weight is None else changes.weight
        return SourceMix(weight=weight, alpha=subfolder_mix.alpha, shares=subfolder_mix.shares)


class PhaseSpec(Section):
    """Change of the mixture of sources at a training step, which holds until another phase changes it again."""

    from_step: StepCount
    """Number of optimizer steps before this phase begins."""
    sources: dict[str, SourceMix] = Field(min_length=1)
    """Changes to the mixture, by name of the source."""


SourceName = Annotated[str, Field(pattern=r"^[^/]+$")]
"""Name of a source, without a slash because a domain is named SOURCE/SUBFOLDER."""


class SourceSpec(Section):
    """Source of raw text or images: a folder with a subfolder per domain (RedPajama) or language, or plain files."""

    path: str
    """Path of a folder or a file, or a pattern with * and **; local, or with s3:// or gs://. A query may name the
    server, as pyarrow writes it: s3://bucket/folder?region=eu-west-1&endpoint_override=storage.example:9000."""
    format: Format | None = None
    """Format of the files. By default it is recognized by the files' names. RedPajama-1T and most other data sets are
    `jsonl`. Conversations (`chat`) are never recognized: JSON lines or Parquet whose records have `messages`, a list of
    {role, content}, or a `prompt` and a `completion`. Nor are pairs (`preferences`), for direct preference optimization
    (`train.dpo`): records with a `prompt` and two answers to it, `chosen` and `rejected`, each a text or a list of
    messages; lists of whole conversations need no `prompt`. Images are not recognized either: `webdataset` (tar files
    with an image and a caption under each key), `images` (folders of image files, as ImageNet has them) and `coco`
    (captions in COCO's JSON), `vqa` (VQAv2's JSON of questions, with the annotations beside) and `nlvr2` (NLVR2's JSON
    lines). Parquet and `huggingface` may have images as well; see `columns`."""
    columns: list[Column] | None = Field(default=None, min_length=1)
    """Columns of a sample of this source: `text`, `image`, or both; or for vision models `image` and `class`, or
    `image` and `objects`. The default is text and image for webdataset and coco, image for format images, and text for
    all other formats. Images are for models with an encoder and for vision models. `class` is the class of an image: in
    format images it is the name of the folder directly below the path, and in other formats it is read from
    `class_field`. `objects` are the boxes, classes and masks in COCO's JSON of instances. By default, questions have
    image, text and class (the answers), and sentences about two images have second_image as well."""
    text_field: str | None = Field(default=None, min_length=1)
    """Key or column with the text; by default `raw_content` in redpajama-v2, `text` elsewhere. In webdataset it is the
    suffix of the tar member with the caption, by default `txt`; json.KEY names a key of a JSON member."""
    languages: list[str] | None = Field(default=None, min_length=1)
    """Languages of the captions to read, by default all, for format webdataset if `text_field` is json.KEY and KEY
    holds an object with a caption for each language. An image becomes a sample with each of its captions."""
    class_field: str | None = Field(default=None, min_length=1)
    """Column of Parquet or `huggingface` with the class, a text or a number; by default `label`. In webdataset it is
    the suffix of the tar member with the class, by default `cls`; json.KEY names a key of a JSON member."""
    image_field: str | None = Field(default=None, min_length=1)
    """Column of Parquet or `huggingface` with the image, as bytes or as {bytes, path}; by default `image`. If another
    source has images, those in the records of a source of texts alone are hashed, so that the text of a held-out image
    is held out, too: by default those in the columns of the other sources, or in image, jpg, png or webp."""
    delimiter: str | None = None
    """Line that ends a document in format text ("" is a blank line). By default a file is one document."""
    filters: FilterSpec | None = None
    """Filters for format redpajama-v2, which select the documents to keep."""
    weight: Weight = 1.0
    """Mixture weight of this source, relative to the others. 0: unused until the schedule raises it."""
    alpha: float = Field(default=1.0, ge=0, le=1)
    """Temperature of the mixture of subfolders: the share of subfolder i is q_i = p_i^alpha / sum_j p_j^alpha, where
    p_i is its share of the source's tokens."""
    shares: dict[str, Share] | None = Field(default=None, min_length=1)
    """Fixed shares by subfolder, instead of `alpha`. Only the named subfolders are used."""
    max_epochs: Epochs | None = None
    """Largest number of epochs of each subfolder over the whole training. At its limit, a subfolder's samples go to the
    source's other subfolders, in proportion to their shares; if all are at their limits, to the other sources."""
    max_epochs_of: dict[str, Epochs] = Field(default_factory=dict)
    """Largest number of epochs of single subfolders, by name. It takes precedence over `max_epochs`."""

    @field_validator("path")
    @classmethod
    def _normalized_path(cls, path: str) -> str:
        refuse_password(path)
        # A local path loses its scheme here, because all other code takes a path with a scheme for an object store's.
        return path.removeprefix("file://")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shares is not None and self.alpha != 1.0:
            raise ValueError("shares fix the mixture, so alpha would be ignored: give one of the two")
        if self.delimiter is not None and not {"\n", "\r"}.isdisjoint(self.delimiter):
            raise ValueError('delimiter is a line without its line break: "" is a blank one')
        if self.format is not None:
            self.check_format(self.format)
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError("columns has a name twice")
        if "image" in self.sample_columns and self.format not in formats_with("image"):
            formats = ", ".join(formats_with("image"))
            raise ValueError(f"columns has image, so format must be one of {formats}, and it is {self.format}")
        if "text" in self.sample_columns and self.format and "text" not in FORMATS[self.format].possible_columns:
            raise ValueError(f"files of format {self.format} have no text: remove text from columns")
        self._check_annotation_columns()
        return self

    def _check_annotation_columns(self) -> None:
        if ("second_image" in self.sample_columns) != (self.format == "nlvr2"):
            raise ValueError("columns has second_image if, and only if, format is nlvr2")
        if self.format in ("vqa", "nlvr2"):
            if not {"image", "text"}.issubset(self.sample_columns):
                raise ValueError(f"columns of format {self.format} need image and text")
            return
        annotations = [column for column in self.sample_columns if column in ("class", "objects")]
        if annotations and ("image" not in self.sample_columns or len(self.sample_columns) > 2):
            raise ValueError("columns with class or objects are those of vision models: image and one of the two")
        if "class" in annotations and self.format not in formats_with("class"):
            formats = ", ".join(formats_with("class"))
            raise ValueError(f"columns has class, so format must be one of {formats}, and it is {self.format}")
        if "objects" in annotations and self.format not in formats_with("objects"):
            formats = ", ".join(formats_with("objects"))
            raise ValueError(f"columns has objects, so format must be {formats}, and it is {self.format}")
        if self.class_field is not None and ("class" not in annotations or self.format == "images"):
            raise ValueError("class_field is for a class in webdataset, parquet or huggingface, and would be ignored")

    @property
    def sample_columns(self) -> tuple[Column, ...]:
        """Columns of a sample of this source, sorted by name."""
        if self.columns is not None:
            return tuple(sorted(self.columns))
        return ("text",) if self.format is None else FORMATS[self.format].columns

    @property
    def image_column(self) -> str | None:
        """Column with the image of a record; None in formats without columns, and for texts that do not name it."""
        has_columns = self.format is not None and "image_field" in FORMATS[self.format].keys
        if self.image_field is None and "image" in self.sample_columns and has_columns:
            return IMAGE_COLUMNS[0]
        return self.image_field

    @property
    def mix(self) -> SourceMix:
        """Mixture weight and division among subfolders at the start of training."""
        return SourceMix(weight=self.weight, alpha=None if self.shares else self.alpha, shares=self.shares)

    def check_format(self, format: Format) -> None:
        """Raise a ValueError if a key is set that files of `format` do not use."""
        for key, refusal in SOURCE_KEYS.items():
            if getattr(self, key) is not None and key not in FORMATS[format].keys:
                raise ValueError(refusal.format(format))
        if self.languages is not None and not (self.text_field or "").startswith("json."):
            raise ValueError(SOURCE_KEYS["languages"])


class PartSpec(Section):
    """Part of every micro-batch: a fixed number of samples from a mixture of some sources, for one objective."""

    sources: list[SourceName] = Field(min_length=1)
    """Names of the sources of the part. Each source belongs to one part."""
    micro_batch_size: SampleCount
    """Number of samples of this part in a micro-batch."""
    objective: Objective | None = None
    """Training objective of this part. next_token: each token is predicted from those before it; the only objective of
    a decoder. masked: the hidden patches and tokens of an image, a text or a pair are predicted; the default of an
    encoder. contrastive: each image is matched with its text among all texts of the part in the micro-batch, and each
    text with its image. caption: each token of a text, and its end, is predicted from its image and the tokens before
    it. answer: the answer to a question about an image is chosen from classes. compare: a sentence about two images is
    true or false. classify, detect: that of a vision model's task with the part's name; the key can be left out."""
    weight: PositiveFloat = 1.0
    """Factor of this part's mean losses in the loss of an encoder or a vision model, which is the sum over parts."""


class ImageSpec(Section):
    """Limits of images, and their crops in training.

    Validation reads the largest square at the centre of an image, or the whole image for detection of objects.
    """

    max_megapixels: PositiveFloat = 50.0
    """Largest number of pixels of an image, in millions. Larger images are quarantined before they are decoded."""
    min_crop: float = Field(default=0.5, gt=0, le=1)
    """Smallest area of a random crop, as a share of the image's area. Its aspect ratio is between 3/4 and 4/3. 1: no
    random crops, but the largest square at the centre."""
    flip: bool = False
    """If true, half of the crops are mirrored. Captions that mention left or right then become wrong."""


class DataSpec(Section):
    """Sources of text and images, their mixture, the tokenizer, and the packing of tokens into samples."""

    sources: dict[SourceName, SourceSpec] = Field(min_length=1)
    schedule: list[PhaseSpec] = Field(default_factory=list)
    """Changes of the mixture during training, by step."""
    parts: dict[SourceName, PartSpec] = Field(default_factory=dict)
    """Parts of every micro-batch, by name, each with its own samples, order and mixture of sources. Their numbers of
    samples add up to train.micro_batch_size. Without parts, the mixture of all sources fills a micro-batch."""
    prepared: StoragePath
    """Folder for the packed token shards: a path that all nodes share, s3://bucket/folder or gs://bucket/folder. `data
    prepare` writes them once, and training only reads them. If the folder lies below a source's path, it is not part of
    that source."""
    seq_len: OptionalTokenCount = 0
    """T: number of tokens in a sequence; vision models have none. A stored sample of a decoder has T + 1 tokens, of
    which the last T are the targets. A sample of an encoder has T tokens: a start token and those of one text. Captions
    that are longer are cut. A longer text without an image becomes several samples."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Packing of documents into samples. concat: documents follow each other and are cut where a sample ends. best_fit:
    documents that fit are not cut. Samples are filled up with padding, whose targets do not count in the loss. With
    best_fit, a pair of conversations (format `preferences`) has a sample of its own. If both together have more than T
    tokens, the ends of the longer one or of both are cut, down to T / 2 tokens each."""
    images: ImageSpec = ImageSpec()
    """Size limits of images, and their crops in training."""
    tokenizer: StoragePath | None = None
    """Path or URI of a tokenizer.json or of a vocabulary in tiktoken's format; by default one is trained on the
    sources."""
    tokenizer_pattern: str | None = Field(default=None, min_length=1)
    """Pattern that splits text before the merge ranks of a vocabulary in tiktoken's format are applied: a name (gpt2,
    cl100k, o200k or qwen2) or a regular expression."""
    tokenizer_model: Literal["bpe", "unigram"] | None = None
    """Kind of byte-level tokenizer to train, by default bpe; unigram takes several times as long."""
    tokenizer_train_mb: PositiveFloat | None = None
    """Amount of text that the tokenizer is trained on, in millions of characters; by default 20. The text is a sample
    of all domains in the proportions of the mixture."""
    chat_template: StoragePath | None = None
    """Path or URI of the Jinja template that renders conversations (formats `chat` and `preferences`); by default a
    built-in one. The run directory gets a copy, so that the trained model is served with it."""
    validation_fraction: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of documents that are held out for validation. They are chosen by a hash of their text."""
    validation_samples: PositiveInt = 512
    """Largest number of validation samples. If more samples are held out, an evenly spaced selection of them is kept. A
    decoder's selection is made among all held-out samples together. For encoders and vision models, each source gets an
    equal share of the selection, and each domain an equal share of its source's."""
    max_document_mb: PositiveFloat = 32.0
    """Largest size of a document in MB, in the form in which it is stored (its line, its text or image file, or its
    value in a column). Larger documents are quarantined."""
    max_bad_lines: NonNegativeInt = 0
    """Largest number of unreadable lines, rows or text files, which are quarantined; one more stops the job."""
    max_bad_share: float = Field(default=0.0, ge=0, lt=1)
    """Largest share of unreadable lines, rows and text files. It replaces `max_bad_lines` if it allows more."""
    max_bad_files: NonNegativeInt = 0
    """Largest number of files that are partly lost (truncated, damaged or vanished). Their readable part is used; one
    more such file stops the job."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = [phase.from_step for phase in self.schedule]
        # Each phase changes the mixture of the phase before it, so their order matters.
        if steps != sorted(set(steps)):
            raise ValueError(
                f"schedule must be in the order of from_step, each step once, and has {', '.join(map(str, steps))}"
            )
        unknown = sorted({name for phase in self.schedule for name in phase.sources} - self.sources.keys())
        if unknown:
            raise ValueError(
                f"schedule names {unknown[0]!r}, which is not a source; the sources are {', '.join(self.sources)}"
            )
        for step, mixes in self.mixes.items():
            if not any(mix.weight for mix in mixes.values()):
                raise ValueError(f"every source has weight 0 from step {step} on")
        self._check_parts()
        self._check_image_columns()
        if self.tokenizer is None and self.tokenizer_pattern is not None:
            raise ValueError("tokenizer_pattern is for a given vocabulary in tiktoken's format: give tokenizer as well")
        # Both keys default to None instead of the value that then applies, so an explicit value is refused even if it
        # equals that one.
        for key in ("tokenizer_model", "tokenizer_train_mb"):
            if self.tokenizer is not None and getattr(self, key) is not None:
                raise ValueError(f"a tokenizer is given and none is trained, so {key} would be ignored")
        if self.chat_template is not None and not self.chat_sources:
            raise ValueError("chat_template is for sources of format chat or preferences, and there is none: remove it")
        return self

    def _check_parts(self) -> None:
        names = [name for part in self.parts.values() for name in part.sources]
        if not names:
            return
        for name in (*names, *self.sources):
            if name not in self.sources:
                raise ValueError(
                    f"parts name {name!r}, which is not a source; the sources are {', '.join(self.sources)}"
                )
            if names.count(name) != 1:
                raise ValueError(f"source {name} is in {names.count(name)} parts: name it in one")
        for step, mixes in self.mixes.items():
            for part_name, part in self.parts.items():
                if not any(mixes[name].weight for name in part.sources):
                    raise ValueError(f"every source of part {part_name} has weight 0 from step {step} on")

    def _check_image_columns(self) -> None:
        first_sources = dict[str, str]()
        for name, source in self.sources.items():
            if source.image_field is not None and not self.has_images:
                raise ValueError(f"no source has images, so image_field of source {name} would be ignored: remove it")
            if source.image_column is None:
                continue
            first_name = first_sources.setdefault(source.path, name)
            first_column = self.sources[first_name].image_column
            if source.image_column != first_column:
                raise ValueError(
                    f"sources {first_name} and {name} read different images of the same records (image_field "
                    f"{first_column} and {source.image_column}), so that one could train on what the other holds out: "
                    "name the same image_field"
                )

    def image_columns(self, name: str) -> tuple[str, ...]:
        """Return the columns that may hold a source's images, the likeliest first; none if no source has images."""
        source = self.sources[name]
        if source.image_column is not None:
            return (source.image_column,)
        if not self.has_images:
            return ()
        # Sources of the same path come first, because the image in their column decides which records are held out.
        sorted_sources = sorted(self.sources.values(), key=lambda candidate: candidate.path != source.path)
        columns = [candidate.image_column for candidate in sorted_sources if candidate.image_column is not None]
        return tuple(dict.fromkeys([*columns, *IMAGE_COLUMNS]))

    @property
    def has_images(self) -> bool:
        return any("image" in source.sample_columns for source in self.sources.values())

    @property
    def has_texts(self) -> bool:
        return any("text" in source.sample_columns for source in self.sources.values())

    @property
    def chat_sources(self) -> list[str]:
        """Names of the sources with conversations, which may be those of pairs."""
        return [name for name, source in self.sources.items() if source.format in CHAT_FORMATS]

    @property
    def pair_sources(self) -> list[str]:
        return [name for name, source in self.sources.items() if source.format == "preferences"]

    @property
    def train_mb(self) -> float:
        """Number of characters, in millions, that a new tokenizer is trained on."""
        return self.tokenizer_train_mb or 20.0

    @property
    def mixes(self) -> dict[int, dict[str, SourceMix]]:
        """Mix of each source in each phase of training, by the number of steps before the phase."""
        current_mixes = {name: source.mix for name, source in self.sources.items()}
        result = {0: current_mixes}
        for phase in self.schedule:
            current_mixes = current_mixes | {
                name: current_mixes[name].with_changes(mix) for name, mix in phase.sources.items()
            }
            result[phase.from_step] = current_mixes
        return result

    def named_subfolders(self, source: str) -> list[str] | None:
        """Return the sorted subfolders of a source that training uses; None (all) if a phase has no shares."""
        has_shares_in_all_phases = all(mixes[source].shares for mixes in self.mixes.values())
        return self.shared_subfolders(source) if has_shares_in_all_phases else None

    def shared_subfolders(self, source: str) -> list[str]:
        """Return the sorted subfolders of a source that have a fixed share in any phase of training."""
        return sorted({subfolder for mixes in self.mixes.values() for subfolder in mixes[source].shares or ()})


def absolute_path(base: Path, path: str) -> str:
    """Return a local path relative to `base` as an absolute path, and a URI unchanged."""
    return path if "://" in path else str(base / path)
