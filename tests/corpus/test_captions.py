"""Golden tests of the readers of CLDR's annotations, of the table of emoji, and of the texts of Tux Paint's stamps."""

import pytest

from mhmoe_ray.corpus.captions import (
    base_key,
    emoji_concepts,
    read_emoji_table,
    read_locales,
    sequence_key,
    stamp_concept,
)
from mhmoe_ray.errors import DataError

GERMAN = """<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE ldml SYSTEM "../../common/dtd/ldml.dtd">
<ldml><identity><language type="de"/></identity>
  <annotations>
    <annotation cp="👋">Hand | winken</annotation>
    <annotation cp="👋" type="tts">winkende
       Hand</annotation>
    <annotation cp="☺" type="tts">↑↑↑</annotation>
    <annotation cp="🦜" type="tts" draft="unconfirmed">Vogel</annotation>
    <annotation cp="🍪" type="tts" draft="contributed">Keks &amp; Co.</annotation>
  </annotations>
</ldml>"""
GERMAN_DERIVED = """<ldml><annotations>
  <annotation cp="👋🏻" type="tts">winkende Hand: helle Hautfarbe</annotation></annotations></ldml>"""
ENGLISH = """<ldml><annotations>
  <annotation cp="👋">hand | wave</annotation>
  <annotation cp="👋" type="tts">waving hand</annotation>
  <annotation cp="☺" type="tts">smiling face</annotation></annotations></ldml>"""
NO_NAMES = "<ldml><annotations/></ldml>"
TABLE = """
# group: Smileys & Emotion

# subgroup: face-affection
263A FE0F    ; fully-qualified     # x E0.6 smiling face
263A         ; unqualified         # x E0.6 smiling face

# group: People & Body
# subgroup: hand-fingers-open
1F44B        ; fully-qualified     # x E0.6 waving hand
1F44B 1F3FB  ; fully-qualified     # x E1.0 waving hand: light skin tone
# group: Component
# subgroup: skin-tone
1F3FB        ; component           # x E1.0 light skin tone
"""


@pytest.fixture
def locales():
    return read_locales(
        {
            "common/annotations/de.xml": GERMAN.encode(),
            "common/annotationsDerived/de.xml": GERMAN_DERIVED.encode(),
            "common/annotations/en.xml": ENGLISH.encode(),
            "common/annotations/de_CH.xml": GERMAN_DERIVED.encode(),
            "common/annotations/en_GB.xml": NO_NAMES.encode(),
            "common/annotations/root.xml": ENGLISH.encode(),
        }
    )


def test_read_locales_keeps_translated_names_only(locales):
    assert list(locales) == ["de", "de-CH", "en"]
    assert locales["de"].names == {
        "1f44b": "winkende Hand",
        "1f36a": "Keks & Co.",
        "1f44b-1f3fb": "winkende Hand: helle Hautfarbe",
    }
    assert locales["de"].keywords == {"1f44b": ("Hand", "winken")}


def test_read_locales_names_a_damaged_file():
    with pytest.raises(DataError, match=r"annotations a/de\.xml: they are not XML"):
        read_locales({"a/de.xml": b"<ldml>"})


def test_read_emoji_table_has_complete_emoji_with_their_groups():
    assert read_emoji_table(TABLE) == {
        "263a": ("\u263a\ufe0f", "Smileys & Emotion", "face-affection"),
        "1f44b": ("👋", "People & Body", "hand-fingers-open"),
        "1f44b-1f3fb": ("👋🏻", "People & Body", "hand-fingers-open"),
    }


def test_emoji_concepts_need_an_english_name(locales):
    concepts = emoji_concepts(locales, read_emoji_table(TABLE))
    assert list(concepts) == ["1f44b", "263a"]
    assert concepts["1f44b"].captions == {"de": "winkende Hand", "en": "waving hand"}
    assert concepts["1f44b"].keywords == ("hand", "wave")
    assert (concepts["263a"].name, concepts["263a"].class_name) == ("smiling face", "face-affection")


def test_keys_leave_out_the_variation_selector_and_variants():
    key = sequence_key("\U0001f3cb\U0001f3fc\u200d\u2642\ufe0f")
    assert key == "1f3cb-1f3fc-200d-2642"
    assert base_key(key) == "1f3cb"
    assert base_key("1f3fb") == "1f3fb"


def test_stamp_concept_has_its_captions_and_folder():
    concept = stamp_concept(
        "animals/birds/crow.2",
        [
            "A  crow. ",
            "de.utf8=Eine Krähe.",
            "ga.utf8=A crow.",
            "en_GB.utf8=A crow.",
            "nb.utf8=En kråke.",
            "pt_BR.utf8=Um corvo.",
            "sr@latin.utf8=Vrana",
            "ca@valencia.utf8= Un corb.",
            "a note of the author",
        ],
    )
    assert concept is not None
    assert concept.key == "animals__birds__crow_2"
    assert (concept.name, concept.class_name, concept.group) == ("A crow.", "animals/birds", "animals")
    assert concept.captions == {
        "ca-ES-VALENCIA": "Un corb.",
        "de": "Eine Krähe.",
        "en": "A crow.",
        "en-GB": "A crow.",
        "no": "En kråke.",
        "pt": "Um corvo.",
        "sr-Latn": "Vrana",
    }
    assert stamp_concept("a/b", []) is None
