"""Concepts that artists draw, with their names in many languages and their classes.

The concepts are Unicode's emoji. Their names and keywords come from the annotations of CLDR (LDML, part 2), their
groups and subgroups from `emoji-test.txt` (UTS 51). The subjects of Tux Paint's stamps are concepts too, and have
captions of their own.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from xml.etree import ElementTree

from mhmoe_ray.errors import DataError

VARIATION_SELECTOR = "\ufe0f"
"""Character that asks for the character before it to be shown as an image; CLDR leaves it out."""
SKIN_TONES = range(0x1F3FB, 0x1F400)
SEX_SIGNS = "\u2640\u2642"
"""Signs that, joined to an emoji of a person, make it a woman or a man."""
UNTRANSLATED_MARK = "↑↑↑"
"""Text that a locale of CLDR has in place of a name that its parent locale has."""

_CLDR_TAGS = {
    "ca@valencia": "ca-ES-VALENCIA",
    "nb": "no",
    "pt": "pt-PT",
    "pt_BR": "pt",
    "sr@latin": "sr-Latn",
    "zh_CN": "zh",
    "zh_TW": "zh-Hant",
}
"""CLDR's tags of the locales that Tux Paint's stamps name differently, so that a locale has one tag in the sample."""


@dataclass(frozen=True)
class Concept:
    """A thing that artists draw, with its captions.

    Attributes:
        key: key of the concept's files; for an emoji its code points without U+FE0F, such as "1f44b-1f3fb".
        characters: the emoji itself; empty for a stamp.
        name: the English caption.
        class_name: the subgroup of an emoji, or the folder of a stamp.
        captions: the caption by locale, a tag of BCP 47 as CLDR has it ("pt-PT"), including English.
    """

    key: str
    characters: str
    name: str
    keywords: tuple[str, ...]
    class_name: str
    group: str
    captions: Mapping[str, str]


@dataclass
class Annotations:
    """Names and keywords of one locale of CLDR, by the key of a concept."""

    names: dict[str, str] = field(default_factory=dict)
    keywords: dict[str, tuple[str, ...]] = field(default_factory=dict)


def sequence_key(characters: str) -> str:
    """Return the key of an emoji: its code points in hexadecimal, without U+FE0F."""
    return "-".join(f"{ord(c):04x}" for c in characters if c != VARIATION_SELECTOR)


def base_key(key: str) -> str:
    """Return the key of an emoji without its skin tone and sex, the same for all variants."""
    # The key of an emoji consists of hexadecimal code points. Other keys, those of Tux Paint's stamps, contain no code
    # point of a skin tone and stay unchanged.
    tones = {f"{code_point:x}" for code_point in SKIN_TONES}
    untoned_key = "-".join(part for part in key.split("-") if part not in tones) or key
    for sign in SEX_SIGNS:
        untoned_key = untoned_key.removesuffix(f"-200d-{ord(sign):x}")
    return untoned_key


def read_annotations(content: bytes, annotations: Annotations) -> None:
    """Add the names and keywords in a file of CLDR, from `annotations` or `annotationsDerived`, to those of its locale.

    Unconfirmed entries and references to a parent locale are left out. Content that is not XML is an
    ElementTree.ParseError.
    """
    for element in ElementTree.fromstring(content).iter("annotation"):
        text = " ".join((element.text or "").split())
        if not text or UNTRANSLATED_MARK in text or element.get("draft") in ("unconfirmed", "provisional"):
            continue
        key = sequence_key(element.get("cp", ""))
        if element.get("type") == "tts":
            annotations.names[key] = text
        else:
            annotations.keywords[key] = tuple(keyword.strip() for keyword in text.split("|"))


def read_locales(files: Mapping[str, bytes]) -> dict[str, Annotations]:
    """Return the annotations of all locales, by tag of BCP 47, from files that are named by locale ("de_CH.xml").

    A file that is not XML is a DataError.
    """
    locales = dict[str, Annotations]()
    for path, content in sorted(files.items()):
        name = PurePosixPath(path).stem
        # CLDR's root locale has code points in place of names, so it is skipped.
        if name == "root":
            continue
        annotations = locales.setdefault(name.replace("_", "-"), Annotations())
        try:
            read_annotations(content, annotations)
        except ElementTree.ParseError as e:
            raise DataError(
                f"annotations {path}", f"they are not XML ({e})", "delete the package from the cache"
            ) from e
    # Locales without names are left out: CLDR has a file without names for a locale that agrees with its parent in
    # everything.
    return {tag: annotations for tag, annotations in locales.items() if annotations.names}


def read_emoji_table(text: str) -> dict[str, tuple[str, str, str]]:
    """Return the characters, group and subgroup of each complete emoji in `emoji-test.txt`, by key."""
    table, group, subgroup = dict[str, tuple[str, str, str]](), "", ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"# (group|subgroup): (.+)", line):
            if heading[1] == "group":
                group = heading[2]
            else:
                subgroup = heading[2]
        elif row := re.match(r"([0-9A-F ]+); fully-qualified", line):
            characters = "".join(chr(int(code_point, 16)) for code_point in row[1].split())
            table[sequence_key(characters)] = characters, group, subgroup
    return table


def emoji_concepts(locales: Mapping[str, Annotations], table: Mapping[str, tuple[str, str, str]]) -> dict[str, Concept]:
    """Return the concepts of all emoji that have an English name and a class, by key in sorted order."""
    english = locales.get("en", Annotations())
    return {
        key: Concept(
            key=key,
            characters=characters,
            name=english.names[key],
            keywords=english.keywords.get(key, ()),
            class_name=subgroup,
            group=group,
            captions={tag: locale.names[key] for tag, locale in sorted(locales.items()) if key in locale.names},
        )
        for key, (characters, group, subgroup) in sorted(table.items())
        if key in english.names
    }


def stamp_concept(path: str, lines: Iterable[str]) -> Concept | None:
    """Return the concept of a stamp; None without an English caption.

    The path is below the folder of stamps, without suffix ("animals/birds/crow"). The lines are the English caption,
    then translations such as `pt_BR.utf8=Um corvo.`
    """
    first_line, *translation_lines = [" ".join(line.split()) for line in lines] or [""]
    if not first_line:
        return None
    captions = {"en": first_line}
    for line in translation_lines:
        if translation := re.fullmatch(r"([\w@]+)\.utf8= ?(.+)", line):
            locale, caption = translation.groups()
            # Translators' tools fill a missing caption with the English one, so a caption that equals the English one
            # is left out unless the locale is English.
            if caption != first_line or locale.startswith("en_"):
                captions[_CLDR_TAGS.get(locale, locale.replace("_", "-"))] = caption
    folder = PurePosixPath(path).parent
    return Concept(
        # A dot would end the key in WebDataset's format, and a slash would make folders.
        key=path.replace("/", "__").replace(".", "_"),
        characters="",
        name=first_line,
        keywords=(),
        class_name=folder.as_posix(),
        group=folder.parts[0] if folder.parts else "",
        captions=dict(sorted(captions.items())),
    )
