# ruff: noqa: RUF001 - characters of many scripts

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.data.domains import language_of_folder, subfolder_of
from mhmoe_ray.data.inspect.textrules import EXAMPLE_CHARACTERS, RULES, TextView, any_token_pattern, broken_rules
from tests.data.texts import make_documents

PROSE = make_documents("web", 1)[0]
NO_MATCH = re.compile("(?!)")


def find_broken(text, language="", domain="web/all", special_pattern=NO_MATCH):
    folder_language = language_of_folder(subfolder_of(domain))
    return broken_rules(TextView(text, text.split(), language, folder_language, special_pattern))


BAD_TEXT_BY_RULE = {
    "repeated-line": "Please enable cookies.\n" * 40 + PROSE[:60],
    "long-word": f"{PROSE} {'iVBORw0KGgo' * 100}",
    "few-letters": "| 12.5 | 13.9 | 2,401 |\n| 77.0 | 1.25 | 9,999 |\nsum",
    "replacement-character": PROSE + " caf\ufffd",
    "mojibake": PROSE + " L'été à Étretat, déjà".encode().decode("cp1252", "replace").replace("\ufffd", "\x81"),
    "control-characters": PROSE + "\x1b[0m",
    "html": PROSE + "</p> <td>1</td> a&nbsp;b",
}


@pytest.mark.parametrize("rule", BAD_TEXT_BY_RULE)
def test_bad_text_breaks_one_rule_only(rule):
    assert list(find_broken(BAD_TEXT_BY_RULE[rule])) == [rule]


def test_every_rule_has_a_bad_text():
    assert {*BAD_TEXT_BY_RULE, "special-token", "language"} == RULES.keys()


def test_special_token_in_text_is_found():
    special_pattern = any_token_pattern(["<|endoftext|>", "<s>"])
    assert list(find_broken(PROSE + " <|endoftext|>", special_pattern=special_pattern)) == ["special-token"]
    assert list(find_broken("<s>struck</s> " + PROSE, special_pattern=special_pattern)) == ["special-token"]
    assert not find_broken("<|endoftext|>" + PROSE, special_pattern=any_token_pattern([]))


def test_language_other_than_that_of_the_folder_is_found():
    assert find_broken(PROSE, "fr", "web/de") == {"language": "its record says fr"}
    assert not find_broken(PROSE, "de", "web/de")
    assert not find_broken(PROSE, "", "web/de")
    assert not find_broken(PROSE, "fr", "web/book")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize(
    "text", ["“Früher” – das war’s", "Привет, как дела?", "γειά σου Κόσμε", "漢字かな交じり文", "بسم الله", "שלום עולם"]
)
def test_mojibake_of_any_script_is_found(text, encoding):
    mojibake = "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in text.encode())
    assert "mojibake" in find_broken(PROSE + mojibake)


GOOD_TEXTS = [
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


@pytest.mark.parametrize("text", GOOD_TEXTS)
def test_good_texts_break_no_rule(text):
    assert find_broken(text) == {}


@given(st.text(min_size=1, max_size=300).filter(lambda text: not text.isspace()))
def test_examples_of_broken_rules_are_printable_and_short(text):
    for example in find_broken(text, special_pattern=any_token_pattern(["a"])).values():
        assert example.isprintable()
        assert len(example) < 12 * EXAMPLE_CHARACTERS + 40
