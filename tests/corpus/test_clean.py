import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mhmoe_ray.corpus.clean import MIN_DOCUMENT_BYTES, MIN_PARAGRAPH_CHARS, Cleaner, is_english, normalise_text
from mhmoe_ray.corpus.readers import CorpusDocument

PARAGRAPHS = [f"paragraph number {i} says something long enough to be compared with others" for i in range(12)]


def clean_lines(
    cleaner: Cleaner, *paragraphs: str, domain: str = "c4", is_translation: bool = False
) -> list[str] | None:
    """Return the lines of a cleaned document, or None if the cleaner drops it."""
    text = cleaner.clean(CorpusDocument("", list(paragraphs)), domain, is_translation)
    return None if text is None else text.split("\n")


def test_cleaner_keeps_a_paragraph_once_per_domain():
    cleaner = Cleaner()
    assert clean_lines(cleaner, *PARAGRAPHS[:6]) == PARAGRAPHS[:6]
    assert clean_lines(cleaner, "A title", PARAGRAPHS[0].upper(), *PARAGRAPHS[6:], "Example") == [
        "A title",
        *PARAGRAPHS[6:],
        "Example",
    ]
    assert clean_lines(cleaner, *PARAGRAPHS[:6], domain="web") == PARAGRAPHS[:6]


def test_cleaner_drops_a_variant_of_a_document():
    cleaner = Cleaner()
    assert clean_lines(cleaner, *PARAGRAPHS)
    assert clean_lines(cleaner, *PARAGRAPHS) is None
    assert clean_lines(cleaner, *PARAGRAPHS[:8], *("new " + w for w in PARAGRAPHS[:5])) is None
    assert clean_lines(cleaner, *("new " + w for w in PARAGRAPHS[:5]))


def test_cleaner_keeps_a_source_file_once():
    cleaner = Cleaner()
    code = "def f():\n    return 1\n" * 20
    assert clean_lines(cleaner, code) is not None
    assert clean_lines(cleaner, code) is None


def test_cleaner_drops_english_text_in_a_translation():
    cleaner = Cleaner()
    assert clean_lines(cleaner, *PARAGRAPHS, "See also")
    german = [f"Absatz {i} sagt etwas, das lang genug ist, um verglichen zu werden" for i in range(12)]
    new_english = "You can use the dialog to choose which of these files will be read from now on"
    assert (
        clean_lines(
            cleaner, german[0], PARAGRAPHS[1], new_english, "See also", *german[1:], domain="de", is_translation=True
        )
        == german
    )


def test_cleaner_takes_a_partly_translated_listing_as_english():
    cleaner = Cleaner()
    listing = "Sub Main\n  Print Adjacent  ' the length\n  Print Angle\nEnd Sub"
    assert clean_lines(cleaner, listing, *PARAGRAPHS)
    german = [f"Absatz {i} sagt etwas, das lang genug ist, um verglichen zu werden" for i in range(12)]
    translated_listing = listing.replace("the length", "die Länge")
    assert clean_lines(cleaner, translated_listing, *german, domain="de", is_translation=True) == german


@pytest.mark.parametrize(
    "text",
    [
        "Sie können die Datei mit dem Dialog in das Dokument einfügen, und dann ist alles fertig",
        "De gebruiker kan het bestand in de map openen of de inhoud van het document wijzigen",
        "Du kan ikke åbne filen, når den er i brug, for så vil programmet ikke virke",
        "L'utente può aprire il file e modificare in parte il testo che non è protetto",
        "以下の手順で the file を開きます",
        "Writer",
    ],
)
def test_is_english_is_false_for_other_languages(text):
    assert not is_english(text)


@given(st.lists(st.text(st.characters(exclude_characters="\n"), min_size=1), min_size=1, max_size=8), st.booleans())
def test_cleaner_keeps_order_and_drops_repetitions(paragraphs, is_translation):
    paragraphs = [p * 40 for p in paragraphs]
    text = Cleaner().clean(CorpusDocument("", paragraphs), "c4", is_translation)
    if text is None:
        return
    assert len(text.encode()) >= MIN_DOCUMENT_BYTES
    assert unicodedata.is_normalized("NFC", text)
    # `in` consumes the iterator, so the assertion fails if the order of lines is not that of the paragraphs.
    remaining_paragraphs = map(normalise_text, paragraphs)
    assert all(line in remaining_paragraphs for line in text.split("\n"))
    long_lines = [line.casefold() for line in text.split("\n") if len(line) >= MIN_PARAGRAPH_CHARS]
    assert len(long_lines) == len(set(long_lines))
