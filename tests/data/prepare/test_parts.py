import numpy as np
import pytest

from mhmoe_ray.data.prepare.parts import PartSlice, TokenStream, part_file
from mhmoe_ray.data.shards.columns import token_dtype
from mhmoe_ray.errors import DataError


def write_part(folder, name, tokens):
    part_file(folder, name).parent.mkdir(parents=True, exist_ok=True)
    np.array(tokens, "<u2").tofile(part_file(folder, name))


def test_substream_equals_a_range_of_its_tokens(tmp_path):
    write_part(tmp_path, "one", range(10))
    write_part(tmp_path, "two", range(100, 105))
    write_part(tmp_path, "three", range(200, 220))
    stream = TokenStream(
        tmp_path, [PartSlice("one", 2, 10), PartSlice("two", 0, 5), PartSlice("three", 0, 7)], token_dtype(2)
    )
    expected_tokens = [*range(2, 10), *range(100, 105), *range(200, 207)]
    assert stream.read().tolist() == expected_tokens
    for start in range(len(expected_tokens)):
        for stop in range(start + 1, len(expected_tokens) + 1):
            assert stream.substream(start, stop).read().tolist() == expected_tokens[start:stop]
            assert len(stream.substream(start, stop)) == stop - start


def test_stream_reports_a_truncated_part(tmp_path):
    write_part(tmp_path, "one", range(9))
    with pytest.raises(DataError, match="it has 7 tokens of 8 from 2 on"):
        TokenStream(tmp_path, [PartSlice("one", 2, 10)], token_dtype(2)).read()
