import pytest

from mhmoe_ray import plotting
from mhmoe_ray.errors import DataError


def test_check_changes_and_creates_no_file(tmp_path):
    existing_image = tmp_path / "there.png"
    existing_image.write_bytes(b"before")
    plotting.check(existing_image)
    plotting.check(tmp_path / "new.png")
    assert existing_image.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [existing_image]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    for write_image in (plotting.check, lambda path: plotting.save(plotting.new_figure(1, 1), path)):
        with pytest.raises(DataError, match=r"image .*a\.png: No such file or directory; name a file you can write"):
            write_image(tmp_path / "no" / "a.png")


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1"), (1000, "1,000"), (1024, "1K"), (1536, "1,536"), (65536, "64K"), (3 << 20, "3M")]
)
def test_short_abbreviates_multiples_of_1024(number, text):
    assert plotting.short(number) == text


def test_an_image_of_thousands_of_rows_can_be_written(tmp_path):
    plotting.save(plotting.new_figure(1, 4000 * plotting.ROW_INCHES), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
