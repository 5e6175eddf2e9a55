import pytest

from mhmoe_ray.data.domains import CODES, OTHER, UNNAMED, of_folder, of_record


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
def test_a_language_by_any_of_its_names(name, code):
    assert of_folder(name) == of_record(name) == code


@pytest.mark.parametrize("name", ["all", "book", "c4", "github", "web", "stackexchange", "2023-06", ""])
def test_other_folders_name_none(name):
    assert of_folder(name) == UNNAMED


def test_records():
    assert of_record(None) == UNNAMED
    assert of_record("ast") == "ast"  # Asturian is not in the table, and is one all the same
    assert of_record("a programming language") == OTHER


def test_the_table_has_iso_639_1():
    assert len(set(CODES.values())) == 183 - 2  # Norwegian's two written forms are one language here
    assert all(len(code) == 2 for code in CODES.values())
