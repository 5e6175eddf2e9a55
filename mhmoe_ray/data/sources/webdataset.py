"""Reader of WebDataset's tar files, which may be compressed.

The members of a sample follow each other and have the same key: the path up to the first dot of the file name. The
suffix is the rest of the name. Other members are skipped, as are those without a dot.

The image of a sample is the member with the suffix that comes first in `IMAGE_SUFFIXES`. The caption is the member with
the suffix `text_field`, by default `txt`. With `text_field: json.KEY`, it is the value of a key in the member with the
suffix `json`; an object there has a caption for each language, and each caption is a document with the same image. The
class is read in the same way by `class_field`, by default `cls`; under a key, it is a text or an integer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mhmoe_ray.data.images.files import IMAGE_SUFFIXES
from mhmoe_ray.data.sources.compression import decompress
from mhmoe_ray.data.sources.images import check_image, class_annotation, decode_caption, image_document
from mhmoe_ray.data.sources.items import BadLine, DamageError, Document, Fault, RawFile, ReadSettings, Reason, Tally
from mhmoe_ray.data.sources.records import decode_json, json_type
from mhmoe_ray.data.sources.storage import Storage
from mhmoe_ray.data.sources.tar import TarMember, read_members
from mhmoe_ray.spec import SourceSpec

_JSON_PREFIX = "json."
_DEFAULT_TEXT_FIELD, _DEFAULT_CLASS_FIELD = "txt", "cls"


def split_name(name: str) -> tuple[str, str] | None:
    """Return the sample's key and the suffix in the name of a tar member, or None if the name lacks one of them."""
    folder, slash, file_name = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = file_name.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


@dataclass
class _Sample:
    """Members of a tar file with the same key."""

    key: str
    number: int
    """Number of the first member within the tar file, from 1."""
    contents: dict[str, bytes | Fault] = field(default_factory=dict)
    """Content of each needed member, or the reason why it cannot be used, by suffix."""

    special_suffixes: set[str] = field(default_factory=set)
    """Suffixes of needed members that are links or other special files."""

    def add(self, suffix: str, member: TarMember) -> None:
        if member.content is not None:
            self.contents[suffix] = member.content
        elif member.kind == "file":
            self.contents[suffix] = Fault(Reason.TOO_LONG, f"{member.size:,} bytes in .{suffix}")
        else:
            self.special_suffixes.add(suffix)

    def content(self, suffix: str, missing_reason: Reason) -> bytes | Fault:
        """Return the content of a member, or why it cannot be used: `missing_reason` if there is no regular file."""
        if suffix in self.special_suffixes:
            return Fault(missing_reason, f".{suffix} is a link or another special file")
        content = self.contents.get(suffix)
        return Fault(missing_reason, f"no member .{suffix}") if content is None else content


def read_webdataset(
    storage: Storage, file: RawFile, source: SourceSpec, settings: ReadSettings, tally: Tally
) -> Iterator[Document | BadLine]:
    """Yield the samples of a tar file as documents, up to any damage."""
    columns = source.sample_columns
    class_field = (source.class_field or _DEFAULT_CLASS_FIELD) if "class" in columns else None
    # If any source of the spec has images, the images in a source that uses only texts are read, too: their hashes keep
    # all documents of an image on the same side of the validation split.
    image_suffixes = IMAGE_SUFFIXES if "image" in columns or settings.hashes_images else ()
    suffixes = {*image_suffixes}
    if "text" in columns:
        suffixes.add(_suffix(source.text_field or _DEFAULT_TEXT_FIELD))
    if class_field is not None:
        suffixes.add(_suffix(class_field))

    def is_selected(name: str) -> bool:
        parts = split_name(name)
        return parts is not None and parts[1] in suffixes

    def to_items(sample: _Sample) -> list[Document | BadLine]:
        suffix = next((s for s in IMAGE_SUFFIXES if s in sample.contents or s in sample.special_suffixes), None)
        image = None if suffix is None else sample.content(suffix, Reason.NO_IMAGE)
        if "image" in columns:
            image = check_image(image, settings)
        captions: dict[str | None, str | Fault | None] = (
            _captions(sample, source) if "text" in columns else {None: None}
        )
        if not captions:
            tally.dropped["no caption in languages"] += 1
        annotation = class_annotation(_class_name(sample, class_field)) if class_field is not None else None
        items = [
            image_document(file.path, sample.number, sample.key, image, caption, columns, language, annotation)
            for language, caption in captions.items()
        ]
        items = [item._replace(name=sample.key) if isinstance(item, Document) else item for item in items]
        # If the image of a sample cannot be used, neither can its captions, so the sample is a single line in the
        # quarantine.
        return items[:1] if "image" in columns and isinstance(image, Fault) else items

    sample, number = None, 0
    try:
        content = decompress(storage.chunks(file, tally), file.path)
        for member in read_members(content, is_selected, settings.document_bytes):
            number, parts = member.number, split_name(member.name)
            if parts is None or member.kind == "folder":
                continue
            key, suffix = parts
            if sample is None or sample.key != key:
                if sample is not None:
                    yield from to_items(sample)
                sample = _Sample(key, number)
            if suffix in suffixes:
                sample.add(suffix, member)
    except DamageError as damage:
        # The last sample before the damage is yielded if all its members are complete. Otherwise it belongs to the lost
        # part.
        items = to_items(sample) if sample is not None else []
        if items and all(isinstance(item, Document) for item in items):
            yield from items
        elif sample is not None:
            number = sample.number - 1
        yield BadLine(file.path, number + 1, Reason.PART_LOST, damage.reason)
        return
    if sample is not None:
        yield from to_items(sample)


def _suffix(field_name: str) -> str:
    return "json" if field_name.startswith(_JSON_PREFIX) else field_name.lower()


def _read_field(sample: _Sample, field_name: str, missing_reason: Reason, subject: str) -> object | Fault:
    """Return the text of a member, or the JSON value that `json.KEY` names, or the reason why there is none."""
    content = sample.content(_suffix(field_name), missing_reason)
    if isinstance(content, Fault):
        return content
    if not field_name.startswith(_JSON_PREFIX):
        return decode_caption(content, subject)
    try:
        fields = decode_json(content)
    except (ValueError, RecursionError) as e:
        return Fault(Reason.NOT_JSON, str(e))
    key = field_name.removeprefix(_JSON_PREFIX)
    if not isinstance(fields, dict) or key not in fields:
        return Fault(missing_reason, f"no key {key!r} in .json")
    value: object = fields[key]
    return value


def _class_name(sample: _Sample, class_field: str) -> str | Fault:
    value = _read_field(sample, class_field, Reason.NO_CLASS, "class")
    # True and false are integers in Python, but not in JSON.
    if type(value) is int:
        return str(value)
    if isinstance(value, str):
        return value if class_field.startswith(_JSON_PREFIX) else value.strip()
    return _type_fault(value, Reason.NO_CLASS, class_field.removeprefix(_JSON_PREFIX))


def _captions(sample: _Sample, source: SourceSpec) -> dict[str | None, str | Fault | None]:
    """Return the captions or faults of a sample by language; None is the language of a single caption.

    The result is empty if there are captions, but none in the languages that the source selects.
    """
    text_field = source.text_field or _DEFAULT_TEXT_FIELD
    value, key = _read_field(sample, text_field, Reason.NO_TEXT, "caption"), text_field.removeprefix(_JSON_PREFIX)
    if not isinstance(value, dict):
        return {None: value if isinstance(value, str) else _type_fault(value, Reason.NO_TEXT, key)}
    captions = {language: caption for language, caption in value.items() if caption is not None}
    if not captions:
        return {None: Fault(Reason.NO_TEXT, f"{key!r} in .json has no caption")}
    return {
        language: caption if isinstance(caption, str) else _type_fault(caption, Reason.NO_TEXT, f"{key}.{language}")
        for language, caption in captions.items()
        if source.languages is None or language in source.languages
    }


def _type_fault(value: object, reason: Reason, key: str) -> Fault:
    """Return the fault of a value that is no text, which may be a fault already."""
    return value if isinstance(value, Fault) else Fault(reason, f"{key!r} in .json is {json_type(value)}")
