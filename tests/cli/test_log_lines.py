import re
import time
from datetime import UTC, datetime

import pytest
from typer import BadParameter

from mhmoe_ray.cli.logs import compile_pattern, filter_lines, line_time, parse_time

LOG = [
    "before any time",
    "2026-11-26T10:00:00+0000 rank 0 INFO step 1",
    "  a line of that one",
    "(RayTrainWorker pid=3) 2026-11-26T12:30:00+0200 rank 1 INFO step 2",
    "2026-11-26T11:00:00Z step 3 [brackets]",
]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400)])
def test_age_is_parsed_as_a_time(text, seconds):
    assert time.time() - parse_time(text) == pytest.approx(seconds, abs=30)


def test_date_and_time_are_parsed_as_a_time():
    assert parse_time("2026-11-26T10:00:00+00:00") == datetime(2026, 11, 26, 10, tzinfo=UTC).timestamp()
    assert parse_time("2026-11-26T10:00") == datetime(2026, 11, 26, 10).timestamp()
    for text in ("", "10", "soon", "10 m", "-5m"):
        with pytest.raises(BadParameter, match="it is no time"):
            parse_time(text)


def test_line_time_uses_its_offset_or_that_of_this_machine():
    ten = datetime(2026, 11, 26, 10, tzinfo=UTC).timestamp()
    assert [line_time(line) for line in LOG] == [None, ten, None, ten + 1800, ten + 3600]
    ray_line = "2026-11-26 05:10:50,561\tINFO worker.py:2038 -- Started a local Ray instance."
    assert line_time(ray_line) == pytest.approx(datetime(2026, 11, 26, 5, 10, 50, 561000).timestamp())
    for undated_line in ("2026-13-26T10:00:00Z", "0001-01-01 00:00:00", "9999-12-31 23:59:59.9999999"):
        assert line_time(undated_line) is None


def test_lines_are_filtered_by_time_and_pattern():
    start_time = datetime(2026, 11, 26, 10, 30, tzinfo=UTC).timestamp()
    assert list(filter_lines(LOG, None, None)) == LOG
    assert list(filter_lines(LOG, start_time, None)) == LOG[3:]
    assert list(filter_lines(LOG, start_time - 1800, None)) == LOG[1:]
    assert list(filter_lines(LOG, None, compile_pattern("step [13]"))) == [LOG[1], LOG[4]]
    assert list(filter_lines(LOG, start_time, compile_pattern(re.escape("[brackets]")))) == [LOG[4]]
    with pytest.raises(BadParameter, match="it is no regular expression"):
        compile_pattern("step (")
