import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mhmoe_ray.corpus.clean import SHORT_PARAGRAPH, SHORTEST, Cleaner, is_english, normalise
from mhmoe_ray.corpus.readers import Document

WORDS = [f"paragraph number {i} says something long enough to be compared with others" for i in range(12)]


def clean(cleaner: Cleaner, *paragraphs: str, domain: str = "c4", translated: bool = False) -> list[str] | None:
    text = cleaner.clean(Document("", list(paragraphs)), domain, translated)
    return None if text is None else text.split("\n")


def test_a_paragraph_is_kept_once_in_a_domain():
    cleaner = Cleaner()
    assert clean(cleaner, *WORDS[:6]) == WORDS[:6]
    assert clean(cleaner, "A title", WORDS[0].upper(), *WORDS[6:], "Example") == ["A title", *WORDS[6:], "Example"]
    assert clean(cleaner, *WORDS[:6], domain="web") == WORDS[:6]


def test_a_variant_of_a_document_goes_as_a_whole():
    cleaner = Cleaner()
    assert clean(cleaner, *WORDS)
    assert clean(cleaner, *WORDS) is None
    assert clean(cleaner, *WORDS[:8], *("new " + w for w in WORDS[:5])) is None
    assert clean(cleaner, *("new " + w for w in WORDS[:5]))


def test_a_whole_file_is_kept_once():
    cleaner = Cleaner()
    code = "def f():\n    return 1\n" * 20
    assert clean(cleaner, code) is not None
    assert clean(cleaner, code) is None


def test_english_left_in_a_translation_is_dropped():
    cleaner = Cleaner()
    assert clean(cleaner, *WORDS, "See also")
    german = [f"Absatz {i} sagt etwas, das lang genug ist, um verglichen zu werden" for i in range(12)]
    newer = "You can use the dialog to choose which of these files will be read from now on"
    assert clean(cleaner, german[0], WORDS[1], newer, "See also", *german[1:], domain="de", translated=True) == german


def test_a_listing_with_a_few_words_translated_is_english():
    cleaner = Cleaner()
    listing = "Sub Main\n  Print Adjacent  ' the length\n  Print Angle\nEnd Sub"
    assert clean(cleaner, listing, *WORDS)
    german = [f"Absatz {i} sagt etwas, das lang genug ist, um verglichen zu werden" for i in range(12)]
    translated = listing.replace("the length", "die Länge")
    assert clean(cleaner, translated, *german, domain="de", translated=True) == german


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
def test_other_languages_do_not_read_as_english(text):
    assert not is_english(text)


@given(st.lists(st.text(st.characters(exclude_characters="\n"), min_size=1), min_size=1, max_size=8), st.booleans())
def test_what_is_kept_was_there_in_this_order_and_comes_once(paragraphs, translated):
    paragraphs = [p * 40 for p in paragraphs]
    text = Cleaner().clean(Document("", paragraphs), "c4", translated)
    if text is None:
        return
    assert len(text.encode()) >= SHORTEST
    assert unicodedata.is_normalized("NFC", text)
    left = map(normalise, paragraphs)
    assert all(line in left for line in text.split("\n"))  # takes from the iterator: a subsequence
    long = [line.casefold() for line in text.split("\n") if len(line) >= SHORT_PARAGRAPH]
    assert len(long) == len(set(long))
