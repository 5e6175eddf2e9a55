import numpy as np
import pytest

from mhmoe_ray.data.prepare.parts import PartRef, Stream, part_file
from mhmoe_ray.errors import DataError


def write(folder, name, tokens):
    part_file(folder, name).parent.mkdir(parents=True, exist_ok=True)
    np.array(tokens, "<u2").tofile(part_file(folder, name))


def test_a_stretch_of_a_stream_is_that_of_its_tokens(tmp_path):
    write(tmp_path, "one", range(10))
    write(tmp_path, "two", range(100, 105))
    write(tmp_path, "three", range(200, 220))
    stream = Stream(tmp_path, [PartRef("one", 2, 10), PartRef("two", 0, 5), PartRef("three", 0, 7)], 2)
    whole = [*range(2, 10), *range(100, 105), *range(200, 207)]
    assert stream.read().tolist() == whole
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            assert stream.part(start, stop).read().tolist() == whole[start:stop]
            assert len(stream.part(start, stop)) == stop - start


def test_a_part_that_lost_its_end_is_not_read(tmp_path):
    write(tmp_path, "one", range(9))
    with pytest.raises(DataError, match="it has 7 tokens of 8 from 2 on"):
        Stream(tmp_path, [PartRef("one", 2, 10)], 2).read()
