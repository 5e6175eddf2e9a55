import pytest

from mhmoe_ray import pictures
from mhmoe_ray.errors import DataError


def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path):
    existing_picture = tmp_path / "there.png"
    existing_picture.write_bytes(b"before")
    pictures.check(existing_picture)
    pictures.check(tmp_path / "new.png")
    assert existing_picture.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [existing_picture]


def test_what_cannot_be_written_is_one_line(tmp_path):
    for act in (pictures.check, lambda path: pictures.save(pictures.new_figure(1, 1), path)):
        with pytest.raises(DataError, match=r"picture .*a\.png: No such file or directory; name a file you can write"):
            act(tmp_path / "no" / "a.png")


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1"), (1000, "1,000"), (1024, "1K"), (1536, "1,536"), (65536, "64K"), (3 << 20, "3M")]
)
def test_numbers_are_short_and_whole(number, text):
    assert pictures.short(number) == text


def test_a_picture_of_thousands_of_rows_can_be_written(tmp_path):
    pictures.save(pictures.new_figure(1, 4000 * pictures.ROW_INCHES), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
