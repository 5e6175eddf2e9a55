import re
import time
from datetime import UTC, datetime

import pytest
from typer import BadParameter

from mhmoe_ray.cli.logs import chosen, moment, pattern, stamped

LOG = [
    "before any time",
    "2026-11-26T10:00:00+0000 rank 0 INFO step 1",
    "  a line of that one",
    "(RayTrainWorker pid=3) 2026-11-26T12:30:00+0200 rank 1 INFO step 2",
    "2026-11-26T11:00:00Z step 3 [brackets]",
]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400)])
def test_a_moment_is_a_while_ago(text, seconds):
    assert time.time() - moment(text) == pytest.approx(seconds, abs=30)


def test_a_moment_is_a_date_and_time():
    assert moment("2026-11-26T10:00:00+00:00") == datetime(2026, 11, 26, 10, tzinfo=UTC).timestamp()
    assert moment("2026-11-26T10:00") == datetime(2026, 11, 26, 10).timestamp()
    for wrong in ("", "10", "soon", "10 m", "-5m"):
        with pytest.raises(BadParameter, match="it is no time"):
            moment(wrong)


def test_times_have_their_own_offset_or_this_machines():
    ten = datetime(2026, 11, 26, 10, tzinfo=UTC).timestamp()
    assert [stamped(line) for line in LOG] == [None, ten, None, ten + 1800, ten + 3600]
    rays = "2026-11-26 05:10:50,561\tINFO worker.py:2038 -- Started a local Ray instance."
    assert stamped(rays) == pytest.approx(datetime(2026, 11, 26, 5, 10, 50, 561000).timestamp())
    for none in ("2026-13-26T10:00:00Z", "0001-01-01 00:00:00", "9999-12-31 23:59:59.9999999"):
        assert stamped(none) is None


def test_lines_are_chosen_by_time_and_by_what_is_in_them():
    since = datetime(2026, 11, 26, 10, 30, tzinfo=UTC).timestamp()
    assert list(chosen(LOG, None, None)) == LOG
    assert list(chosen(LOG, since, None)) == LOG[3:]
    assert list(chosen(LOG, since - 1800, None)) == LOG[1:]
    assert list(chosen(LOG, None, pattern("step [13]"))) == [LOG[1], LOG[4]]
    assert list(chosen(LOG, since, pattern(re.escape("[brackets]")))) == [LOG[4]]
    with pytest.raises(BadParameter, match="it is no regular expression"):
        pattern("step (")
