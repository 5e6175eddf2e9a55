import pytest

from mhmoe_ray.data.domains import LANGUAGE_CODES, NO_LANGUAGE, OTHER_LANGUAGE, language_of_folder, language_of_record


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("de", "de"),
        ("deu", "de"),
        ("german", "de"),
        ("pt_BR", "pt"),
        ("zh-Hant-TW", "zh"),
        ("Indonesian", "id"),
        ("nb", "no"),
        ("EN", "en"),
    ],
)
def test_language_has_one_code_for_all_its_names(name, code):
    assert language_of_folder(name) == language_of_record(name) == code


@pytest.mark.parametrize("name", ["all", "book", "c4", "github", "web", "stackexchange", "2023-06", ""])
def test_language_of_folder_is_empty_for_other_folders(name):
    assert language_of_folder(name) == NO_LANGUAGE


def test_language_of_record_keeps_codes_outside_the_table():
    assert language_of_record(None) == NO_LANGUAGE
    assert language_of_record("ast") == "ast"  # Asturian is a language that is not in the table
    assert language_of_record("a programming language") == OTHER_LANGUAGE


def test_language_codes_are_those_of_iso_639_1():
    assert len(set(LANGUAGE_CODES.values())) == 183 - 2  # ISO 639-1 has 183 codes; here nb and nn count as no
    assert all(len(code) == 2 for code in LANGUAGE_CODES.values())
