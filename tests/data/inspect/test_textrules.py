# ruff: noqa: RUF001 - characters of many scripts

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.inspect.textrules import RULES, SHOWN, any_of, broken_by
from tests.data.texts import documents

PROSE = documents("web", 1)[0]
NONE = re.compile("(?!)")


def broken(text, language="", domain="web/all", special=NONE):
    return broken_by(text, text.split(), language, domain, special)


BAD = {
    "repeated-line": "Please enable cookies.\n" * 40 + PROSE[:60],
    "long-word": f"{PROSE} {'iVBORw0KGgo' * 100}",
    "few-letters": "| 12.5 | 13.9 | 2,401 |\n| 77.0 | 1.25 | 9,999 |\nsum",
    "replacement-character": PROSE + " caf\ufffd",
    "mojibake": PROSE + " L'été à Étretat, déjà".encode().decode("cp1252", "replace").replace("\ufffd", "\x81"),
    "control-characters": PROSE + "\x1b[0m",
    "html": PROSE + "</p> <td>1</td> a&nbsp;b",
}


@pytest.mark.parametrize("rule", BAD)
def test_a_text_that_breaks_a_rule_breaks_this_one_alone(rule):
    assert list(broken(BAD[rule])) == [rule]


def test_every_rule_has_an_example():
    assert {*BAD, "special-token", "language"} == RULES.keys()


def test_special_tokens():
    special = any_of(["<|endoftext|>", "<s>"])
    assert list(broken(PROSE + " <|endoftext|>", special=special)) == ["special-token"]
    assert list(broken("<s>struck</s> " + PROSE, special=special)) == ["special-token"]
    assert not broken("<|endoftext|>" + PROSE, special=any_of([]))


def test_a_record_that_names_another_language_than_its_folder():
    assert broken(PROSE, "fr", "web/de") == {"language": "its record says fr"}
    assert not broken(PROSE, "de", "web/de")
    assert not broken(PROSE, "", "web/de")
    assert not broken(PROSE, "fr", "web/book")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize(
    "text", ["“Früher” – das war’s", "Привет, как дела?", "γειά σου Κόσμε", "漢字かな交じり文", "بسم الله", "שלום עולם"]
)
def test_mojibake_of_any_script(text, encoding):
    wrong = "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in text.encode())
    assert "mojibake" in broken(PROSE + wrong)


GOOD = [
    PROSE,
    "Ça, c’est l’été à Étretat : « déjà » – où ? Œuvre, naïve, Noël. SÃO PAULO, Nº 5, 1ª, España»",
    "»Spaß« und »Straß«, »Ø« og »Å«; weiß« daß« muß«",
    "Mášš něco, ccco patřří nám. Sýšš! Éžž, íšš, ášš",
    "漢字かな交じり文は単語の間に空白を置きません。" * 60,
    "ภาษาไทยไม่เว้นวรรคระหว่างคำ" * 50,
    "हिन्दी संस्कृत से निकली है और देवनागरी में लिखी जाती है।",
    "def f(x):\n\treturn x\n\n\ndef g(x):\n\treturn 2 * x\n\fclass A:\n\tpass\n",
    "Q: Where?\nA: There.\n" * 2,
    "ha ha ha",
    "if a < b && b > c then &x; <b>one tag</b>",
]


@pytest.mark.parametrize("text", GOOD)
def test_sound_texts_break_none(text):
    assert broken(text) == {}


@given(st.text(min_size=1, max_size=300).filter(lambda text: not text.isspace()))
def test_any_text_can_be_judged_and_shown(text):
    for saw in broken(text, special=any_of(["a"])).values():
        assert saw.isprintable()
        assert len(saw) < 12 * SHOWN + 40
