"""Formats of raw text and images that a source may have, and the properties of each format."""

from typing import TYPE_CHECKING, Literal, NamedTuple

Column = Literal["class", "image", "objects", "second_image", "text"]

_READERS = "mhmoe_ray.data.sources"
_JSON_LINES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".ndjson")
_PARQUET = (".parquet",)


class FormatTraits(NamedTuple):
    """Properties of a format of raw data, by which its files are found, checked and read."""

    reader: str
    """Module and name of the `FormatReader` of a file, or of the `ChatReader` if the format has conversations."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of files; empty if files are found by the folders that contain them."""
    is_recognized: bool = False
    """True if the suffixes determine the format where the spec names none. `data/sources/find.py` recognizes some other
    formats by their folders."""
    keys: tuple[str, ...] = ()
    """Keys of `SOURCE_KEYS` that apply."""
    columns: tuple[Column, ...] = ("text",)
    possible_columns: tuple[Column, ...] = ("text",)
    is_chat: bool = False
    """True if records have conversations, which a chat template renders."""
    has_image_folders: bool = False
    """True if files name images, which are in folders beside them."""


FORMATS: dict[str, FormatTraits] = {
    "jsonl": FormatTraits(f"{_READERS}.records:read_jsonl", _JSON_LINES, is_recognized=True, keys=("text_field",)),
    "redpajama-v2": FormatTraits(f"{_READERS}.redpajama_v2:read_redpajama_v2", keys=("text_field", "filters")),
    "parquet": FormatTraits(
        f"{_READERS}.columns:read_parquet",
        _PARQUET,
        is_recognized=True,
        keys=("text_field", "image_field"),
        possible_columns=("class", "image", "text"),
    ),
    "text": FormatTraits(
        f"{_READERS}.records:read_text", (".txt", ".txt.gz", ".txt.zst"), is_recognized=True, keys=("delimiter",)
    ),
    "huggingface": FormatTraits(
        f"{_READERS}.columns:read_huggingface",
        keys=("text_field", "image_field"),
        possible_columns=("class", "image", "text"),
    ),
    # A record with a conversation may have a text as well, so only the spec can tell which of the two to use.
    "chat": FormatTraits(f"{_READERS}.chat:read_chat", _JSON_LINES + _PARQUET, is_chat=True),
    "preferences": FormatTraits(f"{_READERS}.preferences:read_preferences", _JSON_LINES + _PARQUET, is_chat=True),
    "webdataset": FormatTraits(
        f"{_READERS}.webdataset:read_webdataset",
        (".tar", ".tar.gz", ".tgz", ".tar.zst"),
        keys=("text_field", "languages"),
        columns=("image", "text"),
        possible_columns=("class", "image", "text"),
    ),
    "images": FormatTraits(
        f"{_READERS}.images:read_images",
        (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        columns=("image",),
        possible_columns=("class", "image"),
    ),
    "coco": FormatTraits(
        f"{_READERS}.coco:read_coco",
        (".json", ".json.gz", ".json.zst"),
        columns=("image", "text"),
        possible_columns=("image", "objects", "text"),
        has_image_folders=True,
    ),
    "vqa": FormatTraits(
        f"{_READERS}.questions:read_vqa",
        ("questions.json",),
        columns=("class", "image", "text"),
        possible_columns=("class", "image", "text"),
        has_image_folders=True,
    ),
    "nlvr2": FormatTraits(
        f"{_READERS}.questions:read_nlvr2",
        (".json", ".jsonl"),
        columns=("class", "image", "second_image", "text"),
        possible_columns=("class", "image", "second_image", "text"),
        has_image_folders=True,
    ),
}
"""All formats by their name in a spec (`data.sources.NAME.format`)."""
CHAT_FORMATS = [name for name, traits in FORMATS.items() if traits.is_chat]
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(FORMATS)]

SOURCE_KEYS = {
    "filters": "filters go by RedPajama-V2's signals and tables, which format {} does not have",
    "image_field": "image_field is for a column of parquet or huggingface, and this is {}",
    "delimiter": "delimiter is for format text, and this is {}",
    "text_field": "text_field is for records with a text, and format {} has none",
    "languages": "languages choose captions in a key of JSON: set format webdataset and text_field json.KEY",
}
"""Keys of a source that only some formats use, with the error message for the others."""
IMAGE_COLUMNS = ("image", "jpg", "png", "webp")
"""Names of image columns of Hugging Face and img2dataset; the first is the default of `image_field`."""


def formats_with(column: Column) -> list[str]:
    """Return the sorted names of the formats whose records may have a column."""
    return sorted(name for name, traits in FORMATS.items() if column in traits.possible_columns)
